"""`bench latency`, simulated: what its report contains."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from mlxroute.backend.load import load
from mlxroute.bench.delayed_server import DelayedServer
from mlxroute.bench.latency import LatencyGrid, bench_latency
from mlxroute.bench.latency_sides import SIDES
from mlxroute.large import LargeModel
from mlxroute.small import SmallModel
from tests.support.fakes import ScriptedLarge
from tests.support.tiny import make_tiny_model


class UnstreamedLarge(ScriptedLarge):
    """A scripted large model with the properties that the simulation reads."""

    can_stream = False


def test_a_simulated_report_has_fixed_names(tmp_path: Path) -> None:
    small = SmallModel(*load(make_tiny_model(tmp_path / "tiny")), name="tiny")
    record = tmp_path / "record.jsonl"
    with DelayedServer("http://127.0.0.1:9/v1", record=record) as server:
        report = bench_latency(
            small,
            cast("LargeModel", UnstreamedLarge([(70,)])),
            server,
            [[{"role": "user", "content": "hi"}]],
            LatencyGrid(24, [12.0], [0.1], "constant", measure=False),
            large_step_s=0.01,
        )
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
