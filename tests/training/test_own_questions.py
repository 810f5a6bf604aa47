"""A user's own questions: `calibrate`, `train` and `bench quality`, before a real server."""

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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
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
        yield small, server.url


def own(folder: Path, name: str, numbers: range) -> Path:
    """A file of questions."""
    rows = [{"prompt": f"What comes after {i}?", "answer": str(i + 1)} for i in numbers]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_head_is_fitted_to_own_questions_and_judged_by_others(
    models: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = models

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = main([*arguments, "--small", str(small), "--cache-dir", str(tmp_path)])
        said = capsys.readouterr()
        return code, json.loads(said.out or "{}"), " ".join(said.err.split())

    seen, unseen = own(tmp_path, "seen.jsonl", range(12)), own(tmp_path, "new.jsonl", range(12, 15))
    assert run("calibrate", "--data", str(seen), "--tokens", "40")[0] == 0
    head = tmp_path / "mine.safetensors"
    train = ["train", "--large", url, "--tokens", "4", "--labels", "divergence"]
    code, report, said = run(*train, "--data", str(seen), "--out", str(head))
    assert code == 0, said
    assert (code, report["answers"]) == (0, {"fitted": 9, "held_out": 3})
    assert 0 < report["differing"] < 1
    assert f"--router head --head {head}" in said
    rows = report["recall"].values()
    better = sum(row["head"] for row in rows) > sum(row["entropy"] for row in rows)
    assert ("stay with --router entropy" in said) == (not better)

    quality = ["bench", "quality", "--large", url, "--tokens", "4", "--budget", "30%"]
    quality += ["--router", "head", "--head", str(head)]
    code, _, said = run(*quality, "--data", str(seen))
    assert (code, "fitted to 12 of these 12 questions" in said) == (2, True)
    code, report, said = run(*quality, "--data", str(unseen), "--chats", "3")
    assert (code, list(report["sides"])) == (0, ["small", "large", "head 30%"])
    assert report["sides"]["head 30%"]["escalation_rate"] > 0


@pytest.mark.parametrize("command", ["calibrate", "train", "bench quality"])
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_lost(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = own(tmp_path, "mine.jsonl", range(20))
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows[:12], rows[12][:-1], *rows[13:]]) + "\n")
    head = tmp_path / "mine.safetensors"
    head.write_bytes(b"fitted before")
    arguments = [*command.split(), "--data", str(data)]
    if command != "calibrate":
        arguments += ["--large", "http://127.0.0.1:9/v1"]
    if command == "train":
        arguments += ["--out", str(head)]
    assert main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert str(data) in said
    assert "13" in said
    assert said.count("error:") == 1
    assert head.read_bytes() == b"fitted before"
