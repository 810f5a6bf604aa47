"""What a stand-in for the small model has to have where answers are written in `wait` alone."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.errors import RollbackError
from mlxroute.types import BranchCost, Signals

_ONLY = "this stand-in for the small model only goes on"


class ForwardOnlySmall:
    """Goes on only: nothing can be taken back, and there are no branches."""

    max_rows = 1
    cached_ids: Sequence[int] = ()
    batch_tails: Sequence[Sequence[int]] = ()

    def can_rollback(self, count: int) -> bool:
        """Whether `count` tokens that are fed next could be taken back."""
        return False

    def rollback(self, count: int) -> None:
        """Raises RollbackError."""
        raise RollbackError(_ONLY)

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        """Raises RollbackError."""
        raise RollbackError(_ONLY)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Raises RollbackError."""
        raise RollbackError(_ONLY)

    def select(self, row: int) -> None:
        """Raises RollbackError."""
        raise RollbackError(_ONLY)
