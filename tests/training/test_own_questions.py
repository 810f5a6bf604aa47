"""`calibrate`, `train` and `bench quality` on a user's questions, with a real server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxroute.cli import main
from mlxroute.hosting.launcher import LocalServer
from mlxroute.recorded.large_answers import LargeAnswer, write_large_answers
from tests.support.tiny import make_tiny_model, teach_days


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A small model, and the address of a server with one that mostly agrees."""
    folder = tmp_path_factory.mktemp("models")
    small = make_tiny_model(folder / "small", tied=False, context=2048)
    teach_days(small)
    large = shutil.copytree(small, folder / "large")
    weights = cast("dict[str, mx.array]", mx.load(str(large / "model.safetensors")))
    changed = {name: value + 0.02 * mx.sin(value * 1e3) for name, value in weights.items()}
    mx.save_safetensors(str(large / "model.safetensors"), changed, {"format": "mlx"})
    with LocalServer.launch(large, cache_dir=folder, log_path=folder / "host.log") as server:
        server.wait_until_ready()
        yield small, server.url


# Whether the heads are good does not matter.
pytestmark = pytest.mark.usefixtures("few_steps")


def write_questions(folder: Path, name: str, numbers: range, *, answered: bool = True) -> Path:
    """Write a file of questions, with right answers if `answered`; return it."""
    rows: list[dict[str, str]] = [{"prompt": f"What comes after {i}?"} for i in numbers]
    if answered:
        rows = [row | {"answer": str(i + 1)} for row, i in zip(rows, numbers, strict=True)]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_head_is_fitted_to_a_users_questions_and_judged_by_others(
    models: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = models

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = main([*arguments, "--small", str(small), "--cache-dir", str(tmp_path)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out or "{}"), " ".join(captured.err.split())

    fitted = write_questions(tmp_path, "fitted.jsonl", range(12))
    unused = write_questions(tmp_path, "unused.jsonl", range(12, 15))
    assert run("calibrate", "--data", str(fitted), "--tokens", "20")[0] == 0
    head = tmp_path / "mine.safetensors"
    train = ["train", "--large", url, "--tokens", "3", "--labels", "divergence"]
    code, report, messages = run(*train, "--data", str(fitted), "--out", str(head))
    assert code == 0, messages
    assert (code, report["answers"]) == (0, {"fitted": 9, "held_out": 3})
    assert 0 < report["differing"] < 1
    assert f"use it with --head {head} --budget" in messages
    rows = report["recall"].values()
    better = sum(row["head"] for row in rows) > sum(row["entropy"] for row in rows)
    assert ("stay with --router entropy" in messages) == (not better)

    quality = ["bench", "quality", "--large", url, "--tokens", "3", "--budget", "30%"]
    quality += ["--head", str(head), "--router", "head"]
    code, _, messages = run(*quality, "--data", str(fitted))
    assert (code, "fitted to 12 of these 12 questions" in messages) == (2, True)
    code, report, messages = run(*quality, "--data", str(unused), "--chats", "3")
    assert (code, list(report["sides"])) == (0, ["small", "large", "head 30%"])
    assert report["sides"]["head 30%"]["escalation_rate"] > 0

    # Random weights often end inside a character, where this server cannot be asked.
    baselines = ["bench", "quality", "--large", url, "--tokens", "3", "--budget", "30%"]
    baselines += ["--router", "random", "--router", "first", "--compare", "first 30%,small"]
    baselines += ["--data", str(unused), "--oracles"]
    code, report, messages = run(*baselines)
    assert code == 0, messages
    routers = [side["router"] for side in report["sides"].values()]
    assert routers == [None, None, "random", "first"]
    assert report["form"] == "the prompt alone"
    (pair,) = report["comparisons"]
    assert (pair["first"], pair["second"]) == ("first 30%", "small")
    assert [point["budget"] for point in report["oracles"]["large_outcome"]][-1] == 0.3


def test_a_small_model_is_adapted_to_a_users_questions(
    models: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = models

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = main([*arguments, "--small", str(small), "--cache-dir", str(tmp_path / "cache")])
        captured = capsys.readouterr()
        return code, json.loads(captured.out or "{}"), " ".join(captured.err.split())

    # Random weights give no right answers, and only right ones would be learned.
    data = write_questions(tmp_path, "data.jsonl", range(10), answered=False)
    out = tmp_path / "adapter"
    adapt = ["adapt", "--large", url, "--tokens", "3", "--learning-rate", "5e-3"]
    code, report, messages = run(*adapt, "--data", str(data), "--out", str(out))
    assert code == 0, messages
    assert report["answers"] == {"trained": 8, "held_out": 2}
    assert report["figures"][0]["loss"] > report["kept"]["loss"]
    assert f"use it with --adapter {out}" in messages
    assert "recorded before" not in messages
    provenance = json.loads((out / "provenance.json").read_text())
    assert len(provenance["questions"]) == 10
    assert len(provenance["data"][0]["sha256"]) == 64
    (record,) = (tmp_path / "cache" / "bench").glob("replies-*")
    rows = record.read_bytes()

    # No answer is asked for again, and a folder with files is left alone.
    code, _, messages = run(*adapt, "--data", str(data), "--out", str(out))
    assert (code, "choose a new folder" in messages) == (2, True)
    unfinished = {**provenance, "ended_by": "unfinished"}
    for changed, said in (
        ({"large_record": "other"}, "begun with another large model or server than"),
        ({"examples_sha256": "0" * 64}, "the worked examples have changed since this run was"),
        # Earlier versions judged by cut-off answers too.
        ({"outcomes_of": None}, "or an earlier version began it"),
    ):
        (out / "provenance.json").write_text(json.dumps({**unfinished, **changed}))
        code, _, messages = run(*adapt, "--data", str(data), "--out", str(out))
        assert (code, said in messages) == (2, True)
    (out / "provenance.json").write_text(json.dumps(unfinished))
    questions = data.read_text()
    data.write_text(questions.replace("comes", "came", 1))
    code, _, messages = run(*adapt, "--data", str(data), "--out", str(out))
    assert (code, "the data or the worked examples have changed" in messages) == (2, True)
    data.write_text(questions)
    config = small / "config.json"
    stat = config.stat()
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    code, _, messages = run(*adapt, "--data", str(data), "--out", str(out))
    assert code == 2
    assert f"the files of {small} have changed since this run was interrupted" in messages
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, resumed, messages = run(*adapt, "--data", str(data), "--out", str(out))
    assert code == 0, messages
    assert "resuming round 0 at epoch " in messages
    assert "10 of 10 answers were recorded before. If the large model" in messages
    assert f"changed under the same name, delete {record} " in messages
    assert resumed["figures"][0] == report["figures"][0]
    assert record.read_bytes() == rows
    report = resumed
    more = ["--data", str(data), "--out", str(tmp_path / "b"), "--adapter", str(out)]
    code, further, messages = run(*adapt, *more, "--epochs", "1")
    assert code == 0, messages
    assert record.read_bytes() == rows
    assert further["figures"][0]["loss"] == pytest.approx(report["kept"]["loss"], rel=0.05)
    assert further["started_from"].startswith(f"{small}+")
    assert "the adapter was trained with 2 of the 2 held-out questions" in messages
    again = ["--data", str(data), "--out", str(tmp_path / "c"), "--rounds", "1"]
    code, rounds, messages = run(*adapt, *again, "--epochs", "1")
    assert code == 0, messages
    assert {figures["round"] for figures in rounds["figures"]} == {0, 1}
    assert 0 < rounds["corrections"][0]["agreement"] <= 1

    adapted = ["--data", str(data), "--adapter", str(out)]
    code, _, messages = run("bench", "quality", "--large", url, *adapted)
    assert (code, "trained with 10 of these 10 questions" in messages) == (2, True)
    other = write_questions(tmp_path, "other.jsonl", range(20, 23))
    quality = ["bench", "quality", "--large", url, "--tokens", "6", "--budget", "50%"]
    code, report, messages = run(*quality, "--data", str(other), "--adapter", str(out))
    assert code == 0, messages
    assert sum(side["calls"] for side in report["sides"].values()) > 0
    code, measured, messages = run("calibrate", "--questions", "10", "--tokens", "24", *adapted)
    assert code == 0, messages
    assert "trained with 10 of these 10 questions" in messages
    assert measured["small"] == further["started_from"]


def test_the_provenance_has_the_hash_of_the_data_that_were_read(
    models: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, url = models
    data = write_questions(tmp_path, "data.jsonl", range(10), answered=False)
    before = hashlib.sha256(data.read_bytes()).hexdigest()

    def change_data(*arguments: Any, **options: Any) -> list[LargeAnswer]:
        write_questions(tmp_path, "data.jsonl", range(10, 20), answered=False)
        return write_large_answers(*arguments, **options)

    monkeypatch.setattr("mlxroute.recorded.large_answers.write_large_answers", change_data)
    out = tmp_path / "adapter"
    adapt = ["adapt", "--small", str(small), "--large", url, "--cache-dir", str(tmp_path / "cache")]
    adapt += ["--data", str(data), "--out", str(out), "--tokens", "3", "--epochs", "1"]
    assert main([*adapt, "--learning-rate", "5e-3"]) == 0
    (file,) = json.loads((out / "provenance.json").read_text())["data"]
    assert hashlib.sha256(data.read_bytes()).hexdigest() != before
    assert file["sha256"] == before


@pytest.mark.parametrize("count", [500, 501])
def test_a_run_that_held_out_other_questions_is_not_continued(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Any] = []

    def interrupt(run: object, *_: object) -> None:
        runs.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxroute.cli.commands.adapt._AdaptRun.adapt", interrupt)
    data = write_questions(tmp_path, "questions.jsonl", range(count), answered=False)
    out = tmp_path / "out"
    adapt = ["adapt", "--data", str(data), "--questions", "501", "--out", str(out)]
    adapt += ["--large", "http://127.0.0.1:9/v1"]
    assert main(adapt) == 130
    figures = {"round": 0, "epoch": 0.5, "loss": 1.0, "accuracy": 0.5}
    training = {"figures": [figures], "kept": figures, "corrections": [], "ended_by": "unfinished"}
    report = {"command": runs[0].command, **runs[0].data_report, **training}
    out.mkdir()
    (out / "provenance.json").write_text(json.dumps(report))
    assert main(adapt) == 130
    # An earlier version held out the first questions if there were more than 500.
    report.pop("held_out_from", None)
    (out / "provenance.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert main(adapt) == (130 if count == 500 else 2)
    assert ("or an earlier version began it" in capsys.readouterr().err) == (count > 500)


@pytest.mark.parametrize(
    ("options", "examples", "form"),
    [
        ([], 4, "after 4 worked examples"),
        (["--shots", "0"], 0, "instruction: Solve the problem"),
    ],
)
def test_a_head_is_fitted_to_questions_in_the_form_of_bench_quality(
    options: list[str],
    examples: int,
    form: str,
    models: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small, url = models
    rows = [{"problem": f"What is {i} + 1?", "solution": f"\\boxed{{{i + 1}}}"} for i in range(10)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["--large", url, "--small", str(small), "--cache-dir", str(tmp_path), "--tokens", "4"]
    shared += ["--data", str(data), *options]

    # Whether random weights leave a head something to learn does not matter.
    main(["train", "--labels", "divergence", "--out", str(tmp_path / "h.safetensors"), *shared])
    capsys.readouterr()
    (record,) = (tmp_path / "bench").glob("replies-*")
    rows_before = record.read_bytes()
    # The prompts are the same, so every token of the large model is recorded.
    assert main(["bench", "quality", "--router", "position", "--budget", "1%", *shared]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["examples"] == examples
    assert form in report["form"]
    assert record.read_bytes() == rows_before


@pytest.mark.parametrize("command", ["calibrate", "train", "adapt", "bench quality"])
def test_an_unreadable_row_is_named_and_no_file_is_changed(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_questions(tmp_path, "mine.jsonl", range(20))
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows[:12], rows[12][:-1], *rows[13:]]) + "\n")
    head = tmp_path / "mine.safetensors"
    mx.save_safetensors(str(head), {"0.weight": mx.zeros((1, 4)), "0.bias": mx.zeros(1)})
    fitted_before = head.read_bytes()
    arguments = [*command.split(), "--data", str(data)]
    if command != "calibrate":
        arguments += ["--large", "http://127.0.0.1:9/v1"]
    if command == "adapt":
        arguments += ["--out", str(tmp_path / "adapter")]
    if command == "train":
        arguments += ["--out", str(head)]
    assert main(arguments) == 2
    messages = " ".join(capsys.readouterr().err.split())
    assert str(data) in messages
    assert "13" in messages
    assert messages.count("error:") == 1
    assert head.read_bytes() == fitted_before


def test_a_head_is_fitted_to_advantages_and_the_run_repeats(
    models: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = models
    data = tmp_path / "fitted.jsonl"
    rows = [{"prompt": f"What comes after {i}?"} for i in range(15)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "--small", str(small), "--large", url, "--cache-dir", str(tmp_path)]
    train += ["--data", str(data), "--tokens", "3", "--labels", "advantage", "--budget", "20%"]

    def run(*arguments: str) -> tuple[dict[str, Any], str]:
        code = main([*train, *arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out), " ".join(captured.err.split())

    head = tmp_path / "mine.safetensors"
    report, messages = run("--out", str(head))
    assert report["answers"] == {"fitted": 12, "held_out": 3}
    assert report["routed"]["judged_by"] == "large model"
    assert report["written_by"] == {"router": "entropy", "budget": 0.2}
    assert "3 held-out questions, with at most 20% of the tokens from the large model" in messages
    better = report["routed"]["head"]["accuracy"] > report["routed"]["entropy"]["accuracy"]
    assert ("stay with --router entropy" in messages) == (not better)
    assert f"use it with --head {head} --budget 20%" in messages
    assert "15 of 15 answers of the large model were cut off at 3 tokens, so what is" in messages
    files = sorted((tmp_path / "labels").iterdir())
    assert len(files) == 12
    again, messages = run("--out", str(head))
    assert again == report
    assert "15 of 15 answers were recorded before." in messages
    assert f", and the folder {tmp_path / 'labels'} with the labels of all pairs" in messages
    assert sorted((tmp_path / "labels").iterdir()) == files

    # Answers that a head writes are others.
    report, _ = run("--head", str(head), "--out", str(tmp_path / "next.safetensors"))
    assert report["written_by"] == {"router": "head", "budget": 0.2}
    assert len(list((tmp_path / "labels").iterdir())) == 24


def test_an_interrupt_before_the_first_adapter_says_that_none_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxroute.cli.commands.adapt._AdaptRun.adapt", interrupt)
    data = write_questions(tmp_path, "questions.jsonl", range(10))
    adapt = ["adapt", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*adapt, "--large", "http://127.0.0.1:9/v1"]) == 130
    assert "no adapter was written yet; the recorded answers are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "is_new"),
    [
        ([], True),
        # What a killed run left.
        (["adapter_config.json"], True),
        (["adapter_config.json", ".adapters.12-0a1b2c3d.safetensors"], True),
        # Perhaps the adapter of another program.
        (["adapters.safetensors"], False),
        (["adapters.safetensors", "adapter_config.json"], False),
        (["adapters.safetensors", "notes.txt"], False),
    ],
)
def test_adapt_begins_in_a_folder_without_an_adapter(
    names: list[str],
    is_new: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxroute.cli.commands.adapt._AdaptRun.adapt", interrupt)
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).touch()
    data = write_questions(tmp_path, "questions.jsonl", range(10))
    adapt = ["adapt", "--data", str(data), "--out", str(out), "--large", "http://127.0.0.1:9/v1"]
    assert main(adapt) == (130 if is_new else 2)
    assert ("choose a new folder for the adapter" in capsys.readouterr().err) is not is_new


def test_only_one_run_writes_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_questions(tmp_path, "questions.jsonl", range(10))
    out = tmp_path / "out"
    adapt = ["adapt", "--data", str(data), "--out", str(out), "--large", "http://127.0.0.1:9/v1"]
    codes: list[int] = []

    def run_again(*_: object) -> None:
        codes.append(main(adapt))
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxroute.cli.commands.adapt._AdaptRun.adapt", run_again)
    assert main(adapt) == 130
    assert codes == [2]
    assert f"another run writes to {out}; wait for its end" in capsys.readouterr().err
