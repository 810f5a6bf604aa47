"""Small models without rollback, which is enough for `wait` mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from mlxroute.engine.protocols import SmallProtocol
from mlxroute.errors import RollbackError
from mlxroute.types import (
    BranchCost,
    EncodedPrompt,
    Message,
    Progress,
    Sampling,
    Signals,
    Vocabulary,
)

_MESSAGE: Final = "this small model has no rollback and no branches; use mode wait"
# No value of these is used, because every position is escalated.
_PLACEHOLDER_SIGNALS: Final = Signals(
    token_id=-1,
    logprob=0.0,
    entropy_nats=math.inf,
    margin=0.0,
    varentropy=0.0,
    top_ids=(),
    top_logprobs=(),
    lse=0.0,
)


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


class PlaceholderSmall(ForwardOnlySmall):
    """A small model that decodes nothing; it has the template and vocabulary of `small`.

    Instances in several threads may share one `small`.
    """

    def __init__(self, small: SmallProtocol) -> None:
        self._small = small

    @property
    def vocabulary(self) -> Vocabulary:
        return self._small.vocabulary

    @property
    def context_length(self) -> int:
        return self._small.context_length

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        return self._small.encode_conversation(messages)

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        return _PLACEHOLDER_SIGNALS, 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        return _PLACEHOLDER_SIGNALS
