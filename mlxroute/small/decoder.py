"""Decode steps on the device, with the next forward pass queued ahead of the caller.

A step is one lazy graph: forward pass, logit kernel, sampler, learned head. Before the packed row
of a step is read, the next forward pass is queued on the small model's own token, so that the
device does not wait for Python (`mlx_lm.generate_step` does the same). When the caller commits
another token, the queued pass is discarded: one token is trimmed from the KV cache. Nothing is
queued on caches that cannot be trimmed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxroute.errors import UsageError
from mlxroute.small.hidden_state import HiddenStateTap
from mlxroute.small.kernels import select_kernel, unpack_signals
from mlxroute.small.kv_cache import CLEAR_CACHE_EVERY, CacheLayers, SequenceCache, is_plain
from mlxroute.small.mlp_head import MlpHead, signal_features
from mlxroute.small.model_args import find_argument
from mlxroute.small.row_batch import RowBatch, can_build_rows
from mlxroute.small.row_sampler import RowSampler
from mlxroute.types import Notify, Sampling, Signals

# A prompt this long is evaluated in as many parts as the model has layers, a shorter one in fewer.
_TOKENS_PER_LAYER = 1024

Head = Callable[[mx.array, mx.array], mx.array]
"""A learned head: hidden states [B, D] and packed rows [B, n] to scores [B, 1], all lazy."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A lazy forward pass: `logits` [B, V] of its last position, `states` [B, n, D]."""

    logits: mx.array
    states: mx.array | None

    @property
    def hidden(self) -> mx.array | None:
        """The final hidden state of the last position, [B, D]."""
        return None if self.states is None else self.states[:, -1, :]


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Lazy results of a pass: `packed` rows [B, n], and the model's own `token` [B, 1]."""

    packed: mx.array
    token: mx.array


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The small model's signals at the n positions of a text that another model wrote.

    `logprobs` are those of the text's own tokens, in nats. `hidden` [n, D] are the final hidden
    states, in the model's dtype, and `features` [n, 4] the other inputs of a head.
    """

    signals: tuple[Signals, ...]
    logprobs: tuple[float, ...]
    hidden: mx.array
    features: mx.array


@dataclass(slots=True)
class _RowSupport:
    """Whether a model decodes rows of different lengths; None until that is known."""

    is_supported: bool | None = None


class Decoder:
    """A model, its KV cache and the forward pass queued behind the last step.

    One thread may use it at a time.

    Args:
        model: The `mlx_lm` model.
        kernel: The name of the logit kernel, as in `select_kernel`.
        notify: Receives the warning of `select_kernel`.
    """

    def __init__(self, model: Any, *, kernel: str, notify: Notify) -> None:
        self.cache = SequenceCache(model)
        self._model = model
        self._kernel = select_kernel(kernel, notify=notify)
        self._head: Head | None = None
        self._tap = HiddenStateTap(model)
        self._row_support = _RowSupport()  # Shared with copies.
        self._reset()

    def _reset(self) -> None:
        self.sampler: RowSampler | None = None
        self._queued: _Pass | None = None
        self._queued_id: int | None = None
        self._step_count = 0

    def with_own_cache(self) -> Decoder:
        """Return a decoder of the same model with the same head and an empty KV cache."""
        other = copy.copy(self)
        other.cache = SequenceCache(self._model)
        other._reset()
        return other

    def begin(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Start a sequence; return how many of its leading ids the cache holds."""
        self._discard_queued()
        self.sampler = None if sampling.is_greedy else RowSampler(sampling)
        return self.cache.keep_common_prefix(prompt_ids)

    def reset_cache(self) -> None:
        """Empty the KV cache."""
        self._queued, self._queued_id = None, None
        self.cache.reset()

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Fill the KV cache with tokens, without signals, and wait for the device."""
        self._discard_queued()
        for _ in self.prefill_in_parts(token_ids, parts=1):
            pass

    def prefill_in_parts(
        self, token_ids: Sequence[int], *, parts: int | None = None
    ) -> Iterator[None]:
        """Do what `prefill` does in several parts, with the same result; yield after each part.

        A part is the evaluation of some layers. The cache must not be used before the last part.
        By default there are more parts for more tokens.
        """
        self._discard_queued()
        with self.cache.record_pass(token_ids):
            self._model(mx.array(list(token_ids))[None], cache=self.cache.layers)
            layers = self.cache.layers
            parts = parts or -(-len(layers) * len(token_ids) // _TOKENS_PER_LAYER)
            size = -(-len(layers) // min(parts, len(layers)))
            for begin in range(0, len(layers), size):
                mx.eval([layer.state for layer in layers[begin : begin + size]])
                yield
        mx.clear_cache()

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed committed tokens and return the signals of the next position.

        The next pass is queued before the result is read, so a step costs one device
        synchronisation.
        """
        current = self._take_queued(token_ids) or self._run_pass(token_ids)
        outputs = self._build_outputs(current, [(self.sampler, len(self.cache.token_ids))])
        if self.cache.can_queue:
            with self.cache.record_queued_pass():
                self._queued = self._build_pass(outputs.token)
        try:
            _evaluate_later(outputs.packed)
            if self._queued is not None:
                _evaluate_later(self._queued.logits)
            (values,) = cast("list[list[float]]", outputs.packed.tolist())
        except Exception:
            # The layers hold what was never computed: memory or the device failed.
            self.reset_cache()
            raise
        signals = unpack_signals(values, has_head=self._head is not None)
        self._queued_id = signals.token_id
        self._step_count += 1
        if self._step_count % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return signals

    def extend_unqueued(self, token_ids: Sequence[int]) -> Signals:
        """Feed tokens and return the signals of the next position, with no pass queued."""
        self._discard_queued()
        with self.cache.record_pass(token_ids):
            (signals,) = self.compute_signals(mx.array(list(token_ids))[None], self.cache.layers)
        return signals

    def score_text(self, token_ids: Sequence[int], next_ids: Sequence[int]) -> ScoredText:
        """Feed tokens in one pass and return what the model predicts after each of them.

        `next_ids[i]` is the text's own token after `token_ids[i]`.
        """
        self._discard_queued()
        with self.cache.record_pass(token_ids):
            logits = self._model(mx.array(list(token_ids))[None], cache=self.cache.layers)[0]
        states = self._tap.last()
        packed = self._kernel(logits)
        chosen = mx.take_along_axis(logits, mx.array(list(next_ids))[:, None], axis=-1)
        hidden, features = states[0], signal_features(packed)
        mx.eval(packed, chosen, hidden, features)
        rows = cast("list[list[float]]", packed.tolist())
        signals = [unpack_signals(values, has_head=False) for values in rows]
        next_logits = cast("list[float]", chosen[:, 0].astype(mx.float32).tolist())
        logprobs = [logit - row.lse for logit, row in zip(next_logits, signals, strict=True)]
        return ScoredText(tuple(signals), tuple(logprobs), hidden, features)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Run one step of a batch: row i feeds `token_ids[i]` after what row `parents[i]` holds."""
        self._discard_queued()
        with self.cache.record_batch_pass(parents, token_ids):
            signals = self.compute_signals(mx.array(list(token_ids))[:, None], self.cache.layers)
        return signals

    def compute_signals(
        self,
        tokens: mx.array,
        layers: list[Any],
        samplers: Sequence[tuple[RowSampler | None, int]] = (),
    ) -> list[Signals]:
        """Feed tokens [B, n] to cache layers; return the signals after the last of each row.

        `samplers` are the sampler and the length of each row; by default all rows are greedy.
        """
        packed = self._build_outputs(self._build_pass(tokens, layers), samplers).packed
        rows = cast("list[list[float]]", packed.tolist())
        return [unpack_signals(values, has_head=self._head is not None) for values in rows]

    def start_rows(self) -> RowBatch:
        """Return a batch without rows, independent of this decoder's own cache."""
        return RowBatch(self.compute_signals, self.takes_rows)

    def takes_rows(self, layers: Sequence[Any]) -> bool:
        """Return whether sequences with cache layers like these can be rows of a batch."""
        if not is_plain(layers):
            return False
        support = self._row_support
        if support.is_supported is None:
            support.is_supported = can_build_rows(self._build_pass, layers)
        return support.is_supported

    def check_rows(self, layers: Sequence[Any]) -> None:
        """Raise UsageError for a model whose plain caches cannot be rows of different lengths."""
        if is_plain(layers) and not self.takes_rows(layers):
            raise UsageError(
                "this architecture has one length for all rows, so texts of different lengths"
                " cannot be decoded in a batch"
            )

    def take_cache(self) -> tuple[CacheLayers, list[int]]:
        """Give the KV cache and its ids away and continue with an empty one.

        Raises RollbackError as `SequenceCache.take`.
        """
        self._discard_queued()
        return self.cache.take()

    def load_cache(self, layers: CacheLayers, token_ids: Sequence[int]) -> None:
        """Continue with a KV cache that holds `token_ids`."""
        self._discard_queued()
        self.cache.load(layers, token_ids)

    def continue_greedily(
        self,
        starts: Sequence[tuple[CacheLayers, int]],
        *,
        max_tokens: Sequence[int],
        eos_ids: frozenset[int],
    ) -> list[list[int]]:
        """Continue several sequences greedily, as `continuations.continue_greedily`.

        Raises UsageError for a model that cannot decode rows of different lengths.
        """
        for layers, _ in starts:
            self.check_rows(layers)
        # `mlx_lm.generate` imports transformers, which decoding itself does without.
        from mlxroute.small.continuations import continue_greedily

        return continue_greedily(self._model, starts, max_tokens=max_tokens, eos_ids=eos_ids)

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens and restore the random state before them.

        Raises RollbackError.
        """
        self._discard_queued()
        self.cache.rollback(count)
        if self.sampler is not None:
            self.sampler.rewind(len(self.cache.token_ids))

    def load_head(self, path: Path) -> MlpHead:
        """Read a head from a file and evaluate it in every step from now on."""
        hidden_size = int(find_argument(self._model, "hidden_size") or 0)
        head = MlpHead.load(path, hidden_size=hidden_size)
        self.set_head(head)
        return head

    def set_head(self, head: Head | None) -> None:
        """Evaluate `head` in every step from now on, or none.

        Raises UsageError for an architecture whose hidden state cannot be read.
        """
        if head is not None:
            self._tap.check()
        self._head = head

    def check_hidden_state(self) -> None:
        """Raise UsageError for an architecture whose hidden state cannot be read."""
        self._tap.check()

    def _run_pass(self, token_ids: Sequence[int]) -> _Pass:
        self._discard_queued()
        with self.cache.record_pass(token_ids):
            current = self._build_pass(mx.array(list(token_ids))[None])
            _evaluate_later(current.logits)
        return current

    def _take_queued(self, token_ids: Sequence[int]) -> _Pass | None:
        """Return the queued pass and commit its token if it is the only one of `token_ids`."""
        queued = self._queued
        if queued is None or len(token_ids) != 1 or token_ids[0] != self._queued_id:
            return None
        self._queued = None
        self.cache.confirm_queued(token_ids[0])
        return queued

    def _discard_queued(self) -> None:
        self._queued, self._queued_id = None, None
        self.cache.discard_queued()

    def _build_pass(self, tokens: mx.array, layers: list[Any] | None = None) -> _Pass:
        """Build the graph of a forward pass of tokens [B, n]; nothing is computed yet."""
        logits = self._model(tokens, cache=self.cache.layers if layers is None else layers)[:, -1]
        return _Pass(logits, self._tap.last())

    def _build_outputs(
        self, current: _Pass, samplers: Sequence[tuple[RowSampler | None, int]]
    ) -> _Outputs:
        """Build the graph of packed rows and the model's own tokens from a pass.

        `samplers` are the sampler and the length of each row; without any, all rows are greedy.
        """
        packed = self._kernel(current.logits)
        if any(sampler is not None for sampler, _ in samplers):
            packed = _draw_tokens(packed, current.logits, samplers)
        token = packed[:, :1].astype(mx.int32)
        if self._head is not None:
            hidden = current.hidden
            assert hidden is not None
            packed = mx.concatenate([packed, self._head(hidden, packed)], axis=-1)
        return _Outputs(packed, token)


def _draw_tokens(
    packed: mx.array, logits: mx.array, samplers: Sequence[tuple[RowSampler | None, int]]
) -> mx.array:
    """Return the packed rows with the token and logit that the sampler of the row draws."""
    rows = []
    for index, (sampler, length) in enumerate(samplers):
        row = packed[index : index + 1]
        if sampler is not None:
            row_logits = logits[index : index + 1]
            token = sampler.draw(row_logits, length=length)
            chosen = [token, mx.take_along_axis(row_logits, token, axis=-1)]
            row = mx.concatenate(
                [*(part.astype(mx.float32) for part in chosen), row[:, 2:]], axis=-1
            )
        rows.append(row)
    return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=0)


def _evaluate_later(array: mx.array) -> None:
    start: Callable[..., None] = mx.async_eval
    start(array)
