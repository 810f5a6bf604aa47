"""`bench latency`, simulated: what its report contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mlxroute.backend.load import load
from mlxroute.bench import latency
from mlxroute.bench.delayed_server import DelayedServer
from mlxroute.bench.latency import bench_latency, measure_large_step_s
from mlxroute.bench.latency_sides import SIDES, LatencyGrid
from mlxroute.large import LargeModel
from mlxroute.small import SmallModel
from tests.support.scripted_models import FakeClock, ScriptedLarge, ScriptedSmall
from tests.support.tiny import KINDS, WINDOW, make_tiny_model

if TYPE_CHECKING:
    from mlxroute.types import LargeContext, LargeToken


class UnstreamedLarge(ScriptedLarge):
    """A scripted large model with the properties that the simulation reads."""

    can_stream = False


def simulate(folder: Path, *, kind: str = "llama", content: str = "hi") -> dict[str, Any]:
    path = make_tiny_model(folder / "tiny", model_type=kind, extra=KINDS[kind])
    record = folder / "record.jsonl"
    with DelayedServer("http://127.0.0.1:9/v1", record=record) as server:
        return bench_latency(
            SmallModel(*load(path), name="tiny"),
            cast("LargeModel", UnstreamedLarge([(70,)])),
            server,
            [[{"role": "user", "content": content}]],
            LatencyGrid(14, [12.0], [0.1], "constant", measure=False),
            large_step_s=0.01,
        )


def test_a_simulated_report_has_fixed_names(tmp_path: Path) -> None:
    report = simulate(tmp_path)
    assert report["batch_over_step"] > 0
    assert list(report) == [
        "small",
        "large",
        "prompts",
        "tokens",
        "delay",
        "measured",
        "step_s",
        "batch_over_step",
        "large_step_s",
        "small_only",
        "points",
    ]
    (point,) = report["points"]
    assert list(point) == [
        "rate",
        "ratio",
        "call_s",
        "threshold_nats",
        "passed_on",
        "escalated",
        "realised_rate",
        "agreement",
        "coverage_4",
        "coverage_8",
        "same_text",
        "server_differed",
        "sides",
        "auto_over_best",
        "predicted_tokens_per_s",
        "played_tokens_per_s",
        "large_streaming_tokens_per_s",
    ]
    assert point["escalated"] > 0
    assert point["same_text"]
    assert list(point["sides"]) == list(SIDES)
    side_names = [
        "tokens_per_s",
        "ttft_s",
        "itl_p50_s",
        "itl_p95_s",
        "stall_s",
        "calls_per_token",
        "prefetch_generated",
        "prefetch_used",
        "retracted",
        "redecoded",
        "fallbacks",
    ]
    assert list(report["small_only"]) == side_names
    for side in point["sides"].values():
        assert list(side) == [*side_names, "over_wait", "stall_over_wait", "calls_over_wait"]
    assert list(point["predicted_tokens_per_s"]) == ["wait", "overlap", "hedge"]


@pytest.mark.parametrize(("kind", "content"), [("lfm2", "hi"), ("gemma3_text", "hi" * WINDOW)])
def test_where_nothing_can_be_rolled_back_every_mode_is_as_fast_as_wait(
    kind: str, content: str, tmp_path: Path
) -> None:
    report = simulate(tmp_path, kind=kind, content=content)
    assert report["batch_over_step"] is None
    (point,) = report["points"]
    assert point["escalated"] > 0
    assert point["same_text"]
    assert point["predicted_tokens_per_s"] == {}
    for name in ("overlap", "hedge"):
        assert point["sides"][name]["over_wait"] == 1.0


@dataclass
class TimedCall:
    """A finished call for several tokens."""

    tokens: tuple[LargeToken, ...]

    def join(self) -> None:
        pass

    def result(self) -> tuple[LargeToken, ...]:
        return self.tokens


class TimedLarge(ScriptedLarge):
    """Takes 1 s for a call and 0.5 s for each further token; prompt i has `lengths[i]` tokens."""

    def __init__(self, clock: FakeClock, lengths: Sequence[int]) -> None:
        super().__init__([(70,)])
        self._now = clock
        self._lengths = lengths
        self._prompts: list[str] = []

    def begin(self, context: LargeContext, *, prefetch: int) -> TimedCall:  # type: ignore[override]
        if context.text not in self._prompts:
            self._prompts.append(context.text)
        count = min(prefetch + 1, self._lengths[self._prompts.index(context.text)])
        self._now.now += 1 + 0.5 * (count - 1)
        return TimedCall(super().begin(context, deadline_s=9, prefetch=0).result() * count)


@pytest.mark.parametrize(
    ("lengths", "step_s"),
    [
        # A whole call for many tokens, answers that end before, and one without further tokens.
        ([33], 0.5),
        ([9, 4, 33], 0.5),
        ([1, 1, 5], 0.5),
        # Where no call returns a second token, each token takes a call.
        ([1, 1], 1.0),
    ],
)
def test_the_large_models_speed_is_that_of_the_tokens_that_came(
    lengths: list[int], step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=clock))
    measured = measure_large_step_s(
        cast("SmallModel", ScriptedSmall([70])),
        cast("LargeModel", TimedLarge(clock, lengths)),
        [[{"role": "user", "content": f"prompt {number}"}] for number in range(len(lengths))],
    )
    assert measured == pytest.approx(step_s)
