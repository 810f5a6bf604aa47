"""The part of the small model's KV cache that holds the answer: one row, or rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.engine.modes.decode_context import DecodeContext
from mlxroute.engine.transcript import Transcript
from mlxroute.sequences import common_prefix_length
from mlxroute.types import Signals


class AnswerCache:
    """Brings the small model's KV cache to a branch, by rollback and by feeding tokens.

    The small model owns the cache's content. This object only keeps how many of its tokens were
    computed as a single row, without the rounding of batches.
    """

    def __init__(self, context: DecodeContext) -> None:
        self._context = context
        self._small = context.small
        self._prompt_length = len(context.prompt.ids)
        # Number of leading answer tokens that were computed as a single row.
        self._exact_length = 0

    def __len__(self) -> int:
        """The number of answer tokens that each row holds."""
        tails = self._small.batch_tails
        return len(self._ids) + (len(tails[0]) if tails else 0)

    @property
    def is_batch(self) -> bool:
        """Whether the cache holds rows of a batch."""
        return bool(self._small.batch_tails)

    @property
    def is_exact(self) -> bool:
        """Whether all answer tokens in the cache were computed as a single row."""
        return not self.is_batch and self._exact_length == len(self._ids)

    def feed(self, transcript: Transcript, *, unbatched: bool) -> Signals:
        """Feed an answer to the only row; return the signals of the position after it.

        Cached tokens that are part of the answer are kept, up to the start of a decision: the
        tokens of a decision are fed in one pass, as in `wait`, so that they round the same. With
        `unbatched`, tokens that a batch computed are computed again, and none is batched with other
        answers.
        """
        tokens = transcript.tokens
        reusable = min(len(self._ids), self._exact_length) if unbatched else len(self._ids)
        start = min(reusable, len(tokens) - 1)
        while not tokens[start].starts_decision:
            start -= 1
        self._cut(start)
        later = range(start + 1, len(tokens))
        for end in [*(index for index in later if tokens[index].starts_decision), len(tokens)]:
            signals = self._context.feed(transcript.ids[start:end], unbatched=unbatched)
            if self._exact_length == start and not self._context.was_batched:
                self._exact_length = end
            start = end
        return signals

    def feed_batch(self, parents: Sequence[int], ids: Sequence[int]) -> list[Signals]:
        """Feed one token to each row of a batch, row i continuing row `parents[i]`."""
        return self._small.branch(parents, ids)

    def collapse(self, ids: Sequence[int]) -> None:
        """End the batch: keep the row with the longest prefix of `ids`, and cut it there."""
        if tails := self._small.batch_tails:
            rest = ids[len(self._ids) :]
            rows = range(len(tails))
            self._small.select(max(rows, key=lambda row: common_prefix_length(tails[row], rest)))
        self._cut(common_prefix_length(self._ids, ids))

    def finish(self, ids: Sequence[int], *, last_decision: int) -> None:
        """Make the cache hold the finished answer `ids` up to its last decision.

        `last_decision` is the index in `ids` at which that decision starts.
        """
        self.collapse(ids[:-1])
        # A branch that was complete was not fed while others were decoded.
        if len(self._ids) < last_decision:
            self._small.extend(ids[len(self._ids) : last_decision])

    @property
    def _ids(self) -> Sequence[int]:
        return self._small.cached_ids[self._prompt_length :]

    def _cut(self, length: int) -> None:
        if (surplus := len(self._ids) - length) > 0:
            self._small.rollback(surplus)
            self._exact_length = min(self._exact_length, length)
