"""Every key of the JSON that `calibrate`, `train` and `bench` print as their last line.

The keys are in report_keys.json. A change of that file is a change of the public output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxroute.cli import main
from mlxroute.hosting.launcher import LocalServer
from tests.support.tiny import make_tiny_model, teach_days

KEYS: dict[str, Any] = json.loads(Path(__file__).with_name("report_keys.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A small model, and the address of a server with one that mostly agrees."""
    folder = tmp_path_factory.mktemp("models")
    small = make_tiny_model(folder / "small", tied=False)
    teach_days(small)
    large = shutil.copytree(small, folder / "large")
    weights = cast("dict[str, mx.array]", mx.load(str(large / "model.safetensors")))
    changed = {name: value + 0.02 * mx.sin(value * 1e3) for name, value in weights.items()}
    mx.save_safetensors(str(large / "model.safetensors"), changed, {"format": "mlx"})
    with LocalServer.launch(large, cache_dir=folder, log_path=folder / "host.log") as server:
        server.wait_until_ready()
        yield str(small), server.url


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file of twelve questions."""
    rows = [{"prompt": f"What comes after {i}?", "answer": str(i + 1)} for i in range(12)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def keys_of(value: Any) -> Any:
    """The keys of a report: objects by key, lists by the keys of their first item."""
    if isinstance(value, dict):
        # Only a Mac measures the kernel as Metal.
        return {key: keys_of(item) for key, item in value.items() if key != "metal"}
    if isinstance(value, list):
        return [keys_of(value[0])] if value else []
    return None


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments]) == 0
    return cast("dict[str, Any]", json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_calibrate_and_train(
    models: tuple[str, str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = models
    common = ("--data", data, "--small", small, "--cache-dir", str(tmp_path))
    assert keys_of(report(capsys, "calibrate", *common, "--tokens", "40")) == KEYS["calibrate"]
    head = str(tmp_path / "head.safetensors")
    labels = ("--labels", "divergence", "--tokens", "4")
    train = ("train", *common, *labels, "--large", url, "--out", head)
    assert keys_of(report(capsys, *train)) == KEYS["train"]


def test_bench_speed_and_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlxroute.bench.speed.CONTEXTS", (32,))
    monkeypatch.setattr("mlxroute.bench.kernel_cost.VOCABULARIES", (2000,))
    speed = ("bench", "speed", "--small", "random", "--pairs", "1", "--tokens", "4")
    assert keys_of(report(capsys, *speed, "--cache-dir", str(tmp_path))) == KEYS["bench speed"]
    kernels = report(capsys, "bench", "kernels", "--rounds", "1", "--cache-dir", str(tmp_path))
    assert "metal" in kernels
    assert keys_of(kernels) == KEYS["bench kernels"]


def test_bench_latency_and_quality(
    models: tuple[str, str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = models
    common = ("--small", small, "--large", url, "--cache-dir", str(tmp_path))
    grid = ("--prompts", "2", "--tokens", "6", "--ratio", "4", "--rate", "0.3", "--play")
    latency = report(capsys, "bench", "latency", *common, *grid)
    assert keys_of(latency) == KEYS["bench latency"]
    # One call at a time and few tokens: near ties, the server's batches round differently.
    sides = ("--data", data, "--questions", "3", "--tokens", "4", "--at-once", "1")
    sides += ("--budget", "30%", "--router", "entropy", "--oracles")
    quality = report(capsys, "bench", "quality", *common, *sides)
    assert keys_of(quality) == KEYS["bench quality"]
