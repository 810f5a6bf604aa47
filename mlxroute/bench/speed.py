"""Decoding speed without escalation, compared with `mlx_lm` on the same weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlxroute.bench.kernel_cost import kernel_form
from mlxroute.bench.measurement import ratios, run_interleaved, spread, time_call
from mlxroute.engine import generate
from mlxroute.errors import UsageError
from mlxroute.routers import EntropyRouter, never_escalate
from mlxroute.small import SmallModel
from mlxroute.small.kernels.packed_row import HEADER_SIZE, TOP_K
from mlxroute.small.mlp_head import SIGNAL_COUNT, MlpHead
from mlxroute.statistics import intervals, percentile
from mlxroute.types import Progress, no_progress

CONTEXTS = (128, 512, 1024, 2048, 4096)
VOCABULARIES = (8_192, 49_152, 151_936, 262_144)
_CONTEXT_STEPS = 8
# The first token follows the prompt; the others follow a decode step each.
_MIN_TOKENS = 2
_CONTEXT_ROUNDS = 5
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class SpeedRun:
    """One timed answer.

    Args:
        token_ids: Ids of its tokens.
        times_s: Time of each token, in seconds since the start of the request.
        peak_bytes: Largest memory use of MLX during the answer.
    """

    token_ids: tuple[int, ...]
    times_s: tuple[float, ...]
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first token."""
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])


def bench_speed(
    small: SmallModel,
    prompts: Sequence[str],
    *,
    pairs: int,
    max_tokens: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return a report on answers by both sides, and on the time of a step and of the kernel.

    Steps are timed by context length, the kernel by vocabulary size.

    Args:
        small: The small model, which both sides use.
        prompts: Texts to answer.
        pairs: Number of answers by each side.
        max_tokens: Maximum length of an answer.
        progress: Receives the number of answers so far.
    """
    runs = _run_pairs(small, prompts, pairs, max_tokens, progress)
    ours, theirs = runs["mlxroute"], runs["mlx_lm"]
    kernel_s = _kernel_seconds(_vocabulary_size(small))
    itl_s = percentile(intervals(ours[0].times_s), 0.5)
    return {
        "small": small.name,
        "pairs": pairs,
        "tokens": [len(run.token_ids) for run in ours],
        "same_tokens": all(a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True)),
        "ratio_tokens_per_s": ratios(*_by_side(runs, lambda run: run.tokens_per_s)),
        "ratio_ttft": ratios(*_by_side(runs, lambda run: run.times_s[0])),
        "extra_peak_mib": spread(
            [(a.peak_bytes - b.peak_bytes) / _MIB for a, b in zip(ours, theirs, strict=True)],
            digits=1,
        ),
        **{name: _summary(side) for name, side in runs.items()},
        "router_share_of_step": round(kernel_s / itl_s, 5),
        "head_share_of_step": small.head and round(_head_seconds(small.head) / itl_s, 5),
        "by_context": _by_context(small),
        "kernel_ms_by_vocabulary": {
            str(size): round(1e3 * _kernel_seconds(size), 4) for size in VOCABULARIES
        },
    }


def _run_pairs(
    small: SmallModel, prompts: Sequence[str], pairs: int, max_tokens: int, progress: Progress
) -> dict[str, list[SpeedRun]]:
    """Let both sides answer the prompts in turn, interleaved; return the runs of each."""
    total = 2 * (pairs + 1)
    done = itertools.count(1)

    def with_progress(
        side: Callable[[SmallModel, str, int], SpeedRun],
    ) -> Callable[[int], SpeedRun]:
        def run(index: int) -> SpeedRun:
            result = side(small, prompts[index % len(prompts)], max_tokens)
            progress("pairs", next(done), total)
            return result

        return run

    return run_interleaved(
        {"mlxroute": with_progress(_run_mlxroute), "mlx_lm": with_progress(_run_mlx_lm)},
        rounds=pairs,
    )


def _by_side(
    runs: dict[str, list[SpeedRun]], figure: Callable[[SpeedRun], float]
) -> tuple[list[float], list[float]]:
    """Return a figure of each run of mlxroute, and of each run of mlx_lm."""
    return [figure(run) for run in runs["mlxroute"]], [figure(run) for run in runs["mlx_lm"]]


def _summary(runs: Sequence[SpeedRun]) -> dict[str, Any]:
    """Return the report of one side."""
    itl = [intervals(run.times_s) for run in runs]
    p50, p95 = ([percentile(values, at) for values in itl] for at in (0.5, 0.95))
    return {
        "tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "ttft_s": spread([run.times_s[0] for run in runs]),
        "itl_p50_s": spread(p50, digits=6),
        "itl_p95_s": spread(p95, digits=6),
        "itl_p95_over_p50": ratios(p95, p50),
        "peak_mib": spread([run.peak_bytes / _MIB for run in runs], digits=1),
    }


def _run_mlxroute(small: SmallModel, prompt: str, max_tokens: int) -> SpeedRun:
    _reset(small)
    began_s = time.perf_counter()
    answer = generate(small, None, prompt, router=never_escalate(), max_tokens=max_tokens)
    return _time_tokens((token.token_id for token in answer), began_s)


def _run_mlx_lm(small: SmallModel, prompt: str, max_tokens: int) -> SpeedRun:
    _reset(small)
    began_s = time.perf_counter()
    ids = small.encode_conversation([{"role": "user", "content": prompt}]).ids
    replies = stream_generate(small.model, small.tokenizer, ids, max_tokens=max_tokens)
    return _time_tokens((reply.token for reply in replies), began_s)


def _time_tokens(token_ids: Iterator[int], began_s: float) -> SpeedRun:
    """Return the timed tokens of an answer that began at `began_s` of the clock."""
    timed_ids = [(token_id, time.perf_counter() - began_s) for token_id in token_ids]
    if len(timed_ids) < _MIN_TOKENS:
        raise UsageError(
            "the small model ends an answer after one token, so that no step can be timed; use"
            " another small model",
            parameter="small",
        )
    ids, times_s = zip(*timed_ids, strict=True)
    return SpeedRun(ids, times_s, mx.get_peak_memory())


def _reset(small: SmallModel) -> None:
    """Clear the KV cache, wait for the device, and reset its memory statistics."""
    small.reset_cache()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()


def _by_context(small: SmallModel) -> list[dict[str, Any]]:
    """Return the median step times of both sides after prompts of rising length."""
    sentence_ids = small.vocabulary.encode("The quick brown fox jumps over the lazy dog. ")
    prompt_ids = list(itertools.islice(itertools.cycle(sentence_ids), max(CONTEXTS)))
    layers: list[Any] = make_prompt_cache(small.model)
    cached = 0

    def ours(count: int) -> float:
        return _median_gap(_decode_steps(small, prompt_ids[:count]))

    def theirs(count: int) -> float:
        nonlocal layers, cached
        rest = mx.array(prompt_ids[cached:count])
        steps = generate_step(rest, small.model, max_tokens=_CONTEXT_STEPS, prompt_cache=layers)
        median_s = _median_gap(int(token) for token, _ in steps)
        if can_trim_prompt_cache(layers):
            trim_prompt_cache(layers, layers[0].offset - count + 1)
            cached = count - 1
        else:
            layers, cached = make_prompt_cache(small.model), 0
        return median_s

    def row(count: int) -> dict[str, Any]:
        sides = {"mlxroute": lambda _: ours(count), "mlx_lm": lambda _: theirs(count)}
        times = run_interleaved(sides, rounds=_CONTEXT_ROUNDS)
        return {
            "context": count,
            **{f"{name}_step_s": spread(side, digits=6) for name, side in times.items()},
            "ratio_tokens_per_s": ratios(times["mlx_lm"], times["mlxroute"]),
        }

    rows = [row(n) for n in CONTEXTS if n + _CONTEXT_STEPS < small.context_length]
    _reset(small)
    return rows


def _decode_steps(small: SmallModel, prompt_ids: list[int]) -> Iterator[int]:
    """Yield the tokens of a few decode steps after a prompt."""
    signals, _ = small.prefill(prompt_ids)
    for _ in range(_CONTEXT_STEPS):
        yield signals.token_id
        signals = small.step(signals.token_id)


def _median_gap(token_ids: Iterator[int]) -> float:
    """Return the median time between tokens, in seconds."""
    times = [time.perf_counter() for _ in token_ids]
    return percentile(intervals(times), 0.5)


def _vocabulary_size(small: SmallModel) -> int:
    return int(small.model(mx.array([[0]])).shape[-1])


def _kernel_seconds(size: int) -> float:
    """Return the median seconds of kernel, transfer, signals and router for logits of this size."""
    logits = mx.random.normal((1, size), key=mx.random.key(0)) * 3
    mx.eval(logits)
    form = kernel_form("auto")
    router = EntropyRouter(1.0)

    def work() -> None:
        signals: Any = form(logits)
        router.state.decide(router.score(signals, 0))

    return _median_seconds(work)


def _head_seconds(head: MlpHead) -> float:
    """Return the median seconds of a learned head for one position, with nothing else running."""
    values = head.layers[0][0].shape[1] - SIGNAL_COUNT
    hidden = mx.random.normal((1, values), key=mx.random.key(0))
    packed = mx.random.uniform(1.0, 2.0, (1, HEADER_SIZE + 2 * TOP_K), key=mx.random.key(1))
    mx.eval(hidden, packed)
    return _median_seconds(lambda: mx.eval(head(hidden, packed)))


def _median_seconds(work: Callable[[], None]) -> float:
    """Return the median seconds of 21 calls after a warm-up."""
    work()
    return percentile([time_call(work) for _ in range(21)], 0.5)
