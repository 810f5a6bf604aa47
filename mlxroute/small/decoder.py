"""Decode steps on the device, one step ahead of whoever reads them.

A step is one lazy graph: forward pass, logit kernel, sampler, learned head. The next forward pass
is queued on the small model's own choice before the packed row is read, so that the device does not
wait for Python; what reads its logits is queued with the pass after it, so that Python works beside
the passes and not beside the short kernel. When another token is committed instead, the queued
pass is taken back: one token out of the KV cache. Caches that could not give it back do not run
ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mlxroute.errors import RollbackError
from mlxroute.small.hidden_state import HiddenStateTap
from mlxroute.small.kernels import Kernel, unpack_signals
from mlxroute.small.kv_cache import PrefixCache
from mlxroute.types import Sampling, Signals

if TYPE_CHECKING:
    import mlx.core as mx

_CLEAR_CACHE_EVERY = 256

Head = Callable[["mx.array", "mx.array"], "mx.array"]
"""A learned head: (hidden state [1, D], packed row [1, n]) to a score [1, 1], all lazy."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a forward pass leaves, lazily: logits [B, V] at its last position, states [B, n, D]."""

    logits: mx.array
    states: mx.array | None

    @property
    def hidden(self) -> mx.array | None:
        """The state at the last position, [B, D]."""
        return None if self.states is None else self.states[:, -1, :]


@dataclass(frozen=True, slots=True)
class ScoredText:
    """What a model sees at n positions of a text that another wrote.

    `logprobs` are those of the text's own tokens, in nats; `hidden` are final-norm states [n, D].
    """

    signals: tuple[Signals, ...]
    logprobs: tuple[float, ...]
    hidden: mx.array


@dataclass(frozen=True, slots=True)
class _Queued:
    """What is read of a pass: its packed rows, and the token for the next one."""

    packed: mx.array
    token: mx.array


class Decoder:
    """The model, its KV cache and the step that runs ahead. Not safe for several threads."""

    def __init__(self, model: Any, *, kernel: Kernel) -> None:
        self.cache = PrefixCache(model)
        self.head: Head | None = None
        self._model = model
        self._kernel = kernel
        self._tap = HiddenStateTap(model)
        self._sampler: Callable[[mx.array], mx.array] | None = None
        self._now: _Pass | None = None
        self._ahead: _Pass | None = None
        self._ahead_id: int | None = None
        # While sampling: the random state before each step, by the tokens the cache held after it.
        self._states: list[tuple[int, mx.array]] = []
        self._steps = 0

    def begin(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Start a sequence; return how many of its ids the cache holds already."""
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        self._take_back()
        self._states.clear()
        self._sampler = (
            make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
            if sampling.temperature > 0
            else None
        )
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        return self.cache.keep_common_prefix(prompt_ids)

    def feed(self, token_ids: Sequence[int]) -> None:
        """Run tokens through the model for the cache's sake alone, and wait for it."""
        import mlx.core as mx

        self._take_back()
        with self.cache.feeding(token_ids):
            self._model(mx.array(list(token_ids))[None], cache=self.cache.layers)
        mx.eval([layer.state for layer in self.cache.layers])
        mx.clear_cache()

    def step(self, token_ids: Sequence[int]) -> Signals:
        """Feed committed tokens, queue the step after them, read the signals: one transfer."""
        import mlx.core as mx

        now = self._matching_ahead(token_ids) or self._run_now(token_ids)
        self._now = now
        if self._sampler is not None:
            state = mx.array(_random_state())
            self._states.append((len(self.cache.token_ids), state))
        reading = self._read(now)
        if self.cache.can_run_ahead:
            with self.cache.running_ahead():
                self._ahead = self._pass(reading.token)
        _queue(reading.packed)
        if self._ahead is not None:
            _queue(self._ahead.logits)
        (values,) = cast("list[list[float]]", reading.packed.tolist())
        signals = unpack_signals(values, has_head=self.head is not None)
        self._ahead_id = signals.token_id
        self._steps += 1
        if self._steps % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return signals

    def run(self, token_ids: Sequence[int]) -> Signals:
        """Feed tokens of one sequence; the signals behind the last, with nothing running ahead."""
        import mlx.core as mx

        self._take_back()
        with self.cache.feeding(token_ids):
            (signals,) = self.signals(mx.array(list(token_ids))[None], self.cache.layers)
        self._now = None
        return signals

    def read(self, token_ids: Sequence[int], following: Sequence[int]) -> ScoredText:
        """Feed tokens of one sequence in one pass; what is seen behind each of them.

        `following` are the tokens that come there in fact.
        """
        import mlx.core as mx

        self._take_back()
        with self.cache.feeding(token_ids):
            logits = self._model(mx.array(list(token_ids))[None], cache=self.cache.layers)[0]
        states = self._tap.last()
        self._now = None
        packed = self._kernel(logits)
        chosen = mx.take_along_axis(logits, mx.array(list(following))[:, None], axis=-1)
        hidden = states[0]
        mx.eval(packed, chosen, hidden)
        rows = cast("list[list[float]]", packed.tolist())
        signals = [unpack_signals(values, has_head=False) for values in rows]
        raw = cast("list[float]", chosen[:, 0].astype(mx.float32).tolist())
        logprobs = [value - each.lse for value, each in zip(raw, signals, strict=True)]
        return ScoredText(tuple(signals), tuple(logprobs), hidden)

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """One step of a batch: row i feeds `token_ids[i]` behind what row `parents[i]` holds."""
        import mlx.core as mx

        self._take_back()
        with self.cache.branching(parents, token_ids):
            signals = self.signals(mx.array(list(token_ids))[:, None], self.cache.layers)
        self._now = None
        return signals

    def signals(self, tokens: mx.array, layers: list[Any]) -> list[Signals]:
        """The signals behind tokens [B, n] that these layers take in."""
        packed = self._read(self._pass(tokens, layers)).packed
        rows = cast("list[list[float]]", packed.tolist())
        return [unpack_signals(values, has_head=self.head is not None) for values in rows]

    def select(self, row: int) -> None:
        """Go on with one row of the batch alone."""
        self.cache.select(row)

    def rollback(self, count: int) -> None:
        """Take the last `count` tokens back, with their random numbers. Raises RollbackError."""
        self._take_back()
        self.cache.rollback(count)
        while self._states and self._states[-1][0] > len(self.cache.token_ids):
            _random_state()[:] = self._states.pop()[1]
        self._now = None

    def set_head(self, head: Head | None) -> None:
        """Evaluate `head` in every step from now on; UsageError if the model shows no state."""
        if head is not None:
            self._tap.check()
        self.head = head

    def check_hidden(self) -> None:
        """Raise UsageError for a model that shows no hidden state."""
        self._tap.check()

    def hidden_state(self) -> mx.array:
        """Final-norm output at the last committed position, [hidden size]."""
        self._tap.check()
        hidden = None if self._now is None else self._now.hidden
        if hidden is None:
            raise RollbackError("no hidden state: run a step first")
        return hidden[0]

    def _run_now(self, token_ids: Sequence[int]) -> _Pass:
        import mlx.core as mx

        self._take_back()
        with self.cache.feeding(token_ids):
            now = self._pass(mx.array(list(token_ids))[None])
            _queue(now.logits)
        return now

    def _matching_ahead(self, token_ids: Sequence[int]) -> _Pass | None:
        """The pass that ran ahead, if it ran on exactly these tokens."""
        ahead = self._ahead
        if ahead is None or len(token_ids) != 1 or token_ids[0] != self._ahead_id:
            return None
        self._ahead = None
        self.cache.confirm(token_ids[0])
        return ahead

    def _take_back(self) -> None:
        """Undo the pass that ran ahead."""
        self._ahead, self._ahead_id = None, None
        self.cache.take_back()

    def _pass(self, tokens: mx.array, layers: list[Any] | None = None) -> _Pass:
        """The graph of a forward pass of tokens [B, n]; nothing is computed yet."""
        logits = self._model(tokens, cache=self.cache.layers if layers is None else layers)[:, -1]
        return _Pass(logits, self._tap.last())

    def _read(self, now: _Pass) -> _Queued:
        """The graph of what is read of a pass."""
        import mlx.core as mx

        packed = self._kernel(now.logits)
        if self._sampler is None:
            token = packed[:, :1].astype(mx.int32)
        else:
            token = self._sampled(now.logits)
            chosen = [token, mx.take_along_axis(now.logits, token, axis=-1)]
            packed = mx.concatenate(
                [*(part.astype(mx.float32) for part in chosen), packed[:, 2:]], axis=-1
            )
        if self.head is not None:
            hidden = now.hidden
            assert hidden is not None
            packed = mx.concatenate([packed, self.head(hidden, packed)], axis=-1)
        return _Queued(packed, token)

    def _sampled(self, logits: mx.array) -> mx.array:
        """The token of logits [1, V], [1, 1], as `mlx_lm.generate_step` draws it."""
        import mlx.core as mx

        assert self._sampler is not None
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return self._sampler(logprobs).reshape(1, 1)


def _queue(array: mx.array) -> None:
    import mlx.core as mx

    start: Callable[..., None] = mx.async_eval
    start(array)


def _random_state() -> mx.array:
    """MLX's own state of random numbers, which samplers advance; writing to it sets it."""
    import mlx.core as mx

    state: Any = mx.random.state
    live: mx.array = state[0]
    return live
