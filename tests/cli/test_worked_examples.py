"""Questions as commands ask them: their worked examples, and those that do not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mlxroute.cli import main
from mlxroute.cli.worked_examples import read_examples
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import read_questions
from tests.support.tiny import make_tiny_model


def write_rows(path: Path, count: int, *, length: int = 1) -> Path:
    rows = [
        {"id": f"row-{i}", "prompt": f"Why {i}? " * length, "answer": "yes", "cot": f"So {i}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_question_is_not_its_own_worked_example(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 4)
    questions = read_questions(file)
    assert read_examples(file, 2, questions[2:]) == questions[:2]
    with pytest.raises(UsageError, match=re.escape("the worked example row-1 is also one of")):
        read_examples(file, 2, questions[1:])
    with pytest.raises(UsageError, match=re.escape("the worked example row-0 is also one of")):
        read_examples(file, 2, [replace(questions[0], prompt=" Why  0?\n")])
    assert read_examples(file, 0, questions) == []


def test_a_wanted_number_of_examples_without_any_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_tiny_model(tmp_path / "small", context=64)
    data = write_rows(tmp_path / "rows.jsonl", 2)
    examples = write_rows(tmp_path / "examples.jsonl", 4)
    examples.write_text(examples.read_text().replace("Why", "How"))
    command = ["calibrate", "--data", str(data), "--small", str(small), "--tokens", "1"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    note = "--shots 3 has no effect: there are no built-in worked examples for these questions"
    for options, is_said in (
        (["--shots", "3"], True),
        (["--shots", "3", "--examples", str(examples)], False),
        (["--shots", "0"], False),
        ([], False),
    ):
        main([*command, *options])
        assert (note in " ".join(capsys.readouterr().err.split())) is is_said


def test_a_question_that_does_not_fit_is_named_before_any_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_tiny_model(tmp_path / "small", context=64)
    data = write_rows(tmp_path / "rows.jsonl", 2)
    with data.open("a") as stream:
        long = write_rows(tmp_path / "long.jsonl", 3, length=100).read_text().splitlines()[2]
        stream.write(long + "\n")
    options = ["--small", str(small), "--shots", "0", "--cache-dir", str(tmp_path / "cache")]
    assert main(["calibrate", "--data", str(data), *options]) == 2
    messages = " ".join(capsys.readouterr().err.split())
    assert re.search(r"question row-2: the prompt has [\d,]+ tokens and the small model", messages)


@pytest.mark.parametrize("command", ["adapt", "train --labels preference", "train"])
@pytest.mark.parametrize("answer", ["Jupiter", "The largest planet is Jupiter."])
def test_answers_that_few_texts_repeat_are_named_before_the_server_is_asked(
    command: str,
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxroute.cli.commands.adapt._AdaptRun.adapt", interrupt)
    monkeypatch.setattr("mlxroute.cli.commands.train._fit", interrupt)
    data = write_rows(tmp_path / "rows.jsonl", 10)
    data.write_text(data.read_text().replace('"yes"', json.dumps(answer)))
    out = tmp_path / "out" if command == "adapt" else tmp_path / "head.safetensors"
    arguments = ["--data", str(data), "--out", str(out), "--large", "http://127.0.0.1:9/v1"]
    assert main([*command.split(), *arguments]) == 130
    is_noted = "10 of 10 right answers have 5 words or more" in capsys.readouterr().err
    assert is_noted == (answer != "Jupiter" and command != "train")
