"""Provisional tokens: shown before they are committed, and retracted where they were wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlxroute.engine.modes.branches import Step
from mlxroute.sequences import common_prefix_length
from mlxroute.types import Provisional, Retracted


class ProvisionalTokens:
    """The provisional tokens on show; `retracted` counts those that were taken back."""

    def __init__(self) -> None:
        self._shown_ids: list[int] = []
        self.retracted = 0

    def show(self, steps: Sequence[Step], *, committed: int) -> Iterator[Provisional]:
        """Show the tokens of a branch's steps that are not shown yet.

        `committed` is the number of tokens before them.
        """
        index = committed
        shown = committed + len(self._shown_ids)
        for step in steps:
            decision = step.decision
            texts = step.transcript.texts_from(len(step.transcript) - len(decision.token_ids))
            for token_id, text in zip(decision.token_ids, texts, strict=True):
                if index >= shown:
                    yield Provisional(index, token_id, text, decision.source, decision.signals)
                    self._shown_ids.append(token_id)
                index += 1

    def retract(self, ids: Sequence[int], *, committed: int) -> Iterator[Retracted]:
        """Retract the shown tokens from the first one on that differs from `ids`."""
        same = common_prefix_length(self._shown_ids, ids)
        if same < len(self._shown_ids):
            self.retracted += len(self._shown_ids) - same
            del self._shown_ids[same:]
            yield Retracted(committed + same)

    def on_committed(self, count: int) -> None:
        """Forget the first `count` tokens, which were committed."""
        del self._shown_ids[:count]
