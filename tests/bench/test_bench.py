"""The benchmarks: interleaved sides, report fields, one line of JSON at the end of stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxroute.backend.load import load
from mlxroute.bench.kernel_cost import bench_kernels
from mlxroute.bench.measurement import ratios, run_interleaved, spread
from mlxroute.bench.speed import bench_speed
from mlxroute.cli import main
from mlxroute.cli.bench_report import write_report
from mlxroute.errors import UsageError
from mlxroute.small import SmallModel
from mlxroute.small.kernels import graph_kernel
from mlxroute.small.mlp_head import SIGNAL_COUNT, MlpHead
from tests.support.tiny import KINDS, WINDOW, make_tiny_model


def test_sides_are_interleaved_and_start_equally_often() -> None:
    order: list[str] = []

    def side(name: str, value: float) -> Callable[[int], float]:
        def run(index: int) -> float:
            order.append(f"{name}{index}")
            return value + index

        return run

    results = run_interleaved({"a": side("a", 1.0), "b": side("b", 2.0)}, rounds=3)
    assert order == ["b0", "a0", "a0", "b0", "b1", "a1", "a2", "b2"]
    assert results == {"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}


def test_ratios_are_of_pairs() -> None:
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_bench_kernels_reports_times_ratios_and_errors() -> None:
    report = bench_kernels(rounds=2, sizes=(3000,))
    (entry,) = report["kernels"]
    assert set(entry["ms"]) >= {"chain", "host_copy", "graph"}
    assert entry["error"]["graph"]["same_top_ids"]
    assert entry["error"]["graph"]["entropy_nats"] < 1e-5
    assert all(value["median"] > 0 for value in entry["chain_over"].values())
    assert report["metal"]
    assert list(report) == ["metal", "kernels"]
    assert list(entry) == ["vocabulary", "dtype", "ms", "chain_over", "error"]


def test_the_report_shows_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = graph_kernel.pack_signals
    monkeypatch.setattr(graph_kernel, "pack_signals", lambda logits: plain(logits * 1.1))
    (entry,) = bench_kernels(rounds=1, sizes=(3000,))["kernels"]
    assert entry["error"]["graph"]["entropy_nats"] > 1e-2


@pytest.fixture
def short_speed_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxroute.bench.speed.CONTEXTS", (32,))
    monkeypatch.setattr("mlxroute.bench.speed.VOCABULARIES", (2000,))
    monkeypatch.setattr("mlxroute.bench.speed._CONTEXT_ROUNDS", 1)


def test_the_name_of_a_saved_report_and_what_it_replaces_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    written = "written to bench/results/kernels.json"
    for note in (f"{written}\n", f"{written} in place of the earlier report\n"):
        assert write_report({}, "kernels", save=True) == 0
        assert capsys.readouterr().err == note


@pytest.mark.usefixtures("short_speed_bench")
def test_bench_speed_ends_stdout_with_one_line_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "speed", "--small", "random", "--pairs", "2", "--tokens", "6", "--save"]
    monkeypatch.setattr("sys.argv", ["mlxroute", *arguments])
    assert main(arguments) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    report = json.loads(line)
    assert report["command"] == f"mlxroute {' '.join(arguments)}"
    assert set(report["versions"]) == {"python", "mlxroute", "mlx", "mlx-lm"}
    assert report["same_tokens"] is True
    assert report["tokens"] == [6, 6]
    assert report["ratio_tokens_per_s"]["median"] > 0
    assert report["head_share_of_step"] is None
    assert [entry["context"] for entry in report["by_context"]] == [32]
    for side in ("mlxroute", "mlx_lm"):
        assert set(report[side]) >= {"tokens_per_s", "ttft_s", "itl_p50_s", "itl_p95_s", "peak_mib"}
    assert list(report) == [
        "command",
        "date",
        "machine",
        "versions",
        "small",
        "pairs",
        "tokens",
        "same_tokens",
        "ratio_tokens_per_s",
        "ratio_ttft",
        "extra_peak_mib",
        "mlxroute",
        "mlx_lm",
        "router_share_of_step",
        "head_share_of_step",
        "by_context",
        "kernel_ms_by_vocabulary",
    ]
    assert list(report["machine"]) == ["system", "cores", "blas_threads", "device", "load_average"]
    assert list(report["by_context"][0]) == [
        "context",
        "mlxroute_step_s",
        "mlx_lm_step_s",
        "ratio_tokens_per_s",
    ]
    assert json.loads((tmp_path / "bench/results/speed-random.json").read_text()) == report
    assert "tokens_per_s" in captured.err


def test_bench_speed_says_that_answers_of_one_token_cannot_be_timed(tmp_path: Path) -> None:
    small = SmallModel(*load(make_tiny_model(tmp_path / "tiny")), name="tiny")
    with pytest.raises(UsageError, match="ends an answer after one token"):
        bench_speed(small, ["a"], pairs=1, max_tokens=1)


@pytest.mark.usefixtures("short_speed_bench")
def test_bench_speed_reports_the_cost_of_a_head(tmp_path: Path) -> None:
    small = SmallModel(*load(make_tiny_model(tmp_path / "tiny")), name="tiny")
    size = small.model.args.hidden_size + SIGNAL_COUNT
    small.head = MlpHead(((mx.zeros((1, size)), mx.zeros(1)),))
    report = bench_speed(small, ["hi"], pairs=1, max_tokens=4)
    assert report["same_tokens"] is True
    assert report["head_share_of_step"] > 0


@pytest.mark.usefixtures("short_speed_bench")
@pytest.mark.parametrize("kind", ["gemma3_text", "lfm2"])
def test_bench_speed_measures_models_whose_caches_cannot_be_trimmed(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mlxroute.bench.speed.CONTEXTS", (16, 64))
    path = make_tiny_model(tmp_path / kind, model_type=kind, extra=KINDS[kind])
    small = SmallModel(*load(path), name=kind)
    # Answers leave the sliding window.
    prompt = "hi" * WINDOW
    report = bench_speed(small, [prompt], pairs=1, max_tokens=4)
    assert [row["context"] for row in report["by_context"]] == [16, 64]


def test_bench_kernels_ends_stdout_with_one_line_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxroute.bench.kernel_cost.VOCABULARIES", (2000,))
    assert main(["bench", "kernels", "--rounds", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    entry = json.loads(line)["kernels"][0]
    assert entry["vocabulary"] == 2000
    assert math.isfinite(entry["ms"]["graph"]["median"])
