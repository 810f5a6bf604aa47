"""Decode steps on the device, one step ahead of whoever reads them.

A step is one lazy graph: forward pass, logit kernel, sampler, learned head. The step after it is
queued on the small model's own choice before its packed row is read, so that the device does not
wait for Python. When another token is committed instead, the queued step is taken back: one token
out of the KV cache, and the random state as it was. Caches that could not give the token back do
not run ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mlxroute.errors import RollbackError
from mlxroute.small.cache import PrefixCache
from mlxroute.small.hidden import HiddenStateTap
from mlxroute.small.kernels import Kernel, unpack
from mlxroute.types import Sampling, Signals

if TYPE_CHECKING:
    import mlx.core as mx

_CLEAR_CACHE_EVERY = 256

Head = Callable[["mx.array", "mx.array"], "mx.array"]
"""A learned head: (hidden state [1, D], packed row [1, n]) to a score [1, 1], all lazy."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One position that was queued: its packed row, its token for the next step, its state."""

    packed: mx.array
    token: mx.array
    hidden: mx.array | None
    random_state: mx.array | None


class Decoder:
    """The model, its KV cache and the step that runs ahead. Not safe for several threads."""

    def __init__(self, model: Any, *, kernel: Kernel) -> None:
        self.cache = PrefixCache(model)
        self.head: Head | None = None
        self._model = model
        self._kernel = kernel
        self._tap = HiddenStateTap(model)
        self._sampler: Callable[[mx.array], mx.array] | None = None
        self._now: _Step | None = None
        self._ahead: _Step | None = None
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
        if now.random_state is not None:
            self._states.append((len(self.cache.token_ids), now.random_state))
        if self.cache.can_run_ahead:
            self._run_ahead(now.token)
        (values,) = cast("list[list[float]]", now.packed.tolist())
        signals = unpack(values, has_head=self.head is not None)
        self._ahead_id = signals.token_id
        self._steps += 1
        if self._steps % _CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return signals

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """One step of a batch: row i feeds `token_ids[i]` behind what row `parents[i]` holds."""
        import mlx.core as mx

        self._take_back()
        with self.cache.branching(parents, token_ids):
            step = _queued(self._build(mx.array(list(token_ids))[:, None]))
        self._now = None
        rows = cast("list[list[float]]", step.packed.tolist())
        return [unpack(values, has_head=self.head is not None) for values in rows]

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
        self._take_back()
        self.head = head

    def hidden_state(self) -> mx.array:
        """Final-norm output at the last committed position, [hidden size]."""
        self._tap.check()
        if self._now is None or self._now.hidden is None:
            raise RollbackError("no hidden state: run a step first")
        return self._now.hidden[0]

    def _run_now(self, token_ids: Sequence[int]) -> _Step:
        import mlx.core as mx

        self._take_back()
        with self.cache.feeding(token_ids):
            step = self._build(mx.array(list(token_ids))[None])
        return _queued(step)

    def _run_ahead(self, token: mx.array) -> None:
        with self.cache.running_ahead():
            step = self._build(token)
        self._ahead = _queued(step)

    def _matching_ahead(self, token_ids: Sequence[int]) -> _Step | None:
        """The step that ran ahead, if it ran on exactly these tokens."""
        step = self._ahead
        if step is None or len(token_ids) != 1 or token_ids[0] != self._ahead_id:
            return None
        self._ahead = None
        self.cache.confirm(token_ids[0])
        return step

    def _take_back(self) -> None:
        """Undo the step that ran ahead: its token and its use of random numbers."""

        step, self._ahead, self._ahead_id = self._ahead, None, None
        self.cache.take_back()
        if step is not None and step.random_state is not None:
            _random_state()[:] = step.random_state

    def _build(self, tokens: mx.array) -> _Step:
        """The graph of one step for tokens [1, n]; nothing is computed yet."""
        import mlx.core as mx

        random_state = mx.array(_random_state()) if self._sampler else None
        logits = self._model(tokens, cache=self.cache.layers)[:, -1, :]
        hidden = self._tap.last()
        packed = self._kernel(logits)
        if self._sampler is None:
            token = packed[:, :1].astype(mx.int32)
        else:
            token = self._sampled(logits)
            chosen = [token, mx.take_along_axis(logits, token, axis=-1)]
            packed = mx.concatenate(
                [*(part.astype(mx.float32) for part in chosen), packed[:, 2:]], axis=-1
            )
        if self.head is not None:
            packed = mx.concatenate([packed, self.head(hidden, packed)], axis=-1)
        return _Step(packed, token, hidden, random_state)

    def _sampled(self, logits: mx.array) -> mx.array:
        """The token of logits [1, V], [1, 1], as `mlx_lm.generate_step` draws it."""
        import mlx.core as mx

        assert self._sampler is not None
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return self._sampler(logprobs).reshape(1, 1)


def _queued(step: _Step) -> _Step:
    import mlx.core as mx

    start: Callable[..., None] = mx.async_eval
    start(step.packed, step.token)
    return step


def _random_state() -> mx.array:
    """MLX's own state of random numbers, which samplers advance; writing to it sets it."""
    import mlx.core as mx

    state: Any = mx.random.state
    live: mx.array = state[0]
    return live
