"""A base class for small models without rollback, which is enough for `wait` mode."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.errors import RollbackError
from mlxroute.types import BranchCost, Signals

_MESSAGE = "this small model has no rollback and no branches; use mode wait"


class ForwardOnlySmall:
    """A small model that has neither rollback nor branches: their part of `SmallProtocol`."""

    max_rows = 1
    cached_ids: Sequence[int] = ()
    batch_tails: Sequence[Sequence[int]] = ()

    def can_rollback(self, count: int) -> bool:
        """Return False: no token can be rolled back."""
        return False

    def rollback(self, count: int) -> None:
        """Raise RollbackError."""
        raise RollbackError(_MESSAGE)

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        """Raise RollbackError."""
        raise RollbackError(_MESSAGE)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Raise RollbackError."""
        raise RollbackError(_MESSAGE)

    def select(self, row: int) -> None:
        """Raise RollbackError."""
        raise RollbackError(_MESSAGE)
