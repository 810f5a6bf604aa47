"""Files of questions: what is understood, and what is said of rows that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxroute.cli.folders import bench_file
from mlxroute.errors import UsageError
from mlxroute.questions.grading import grade
from mlxroute.questions.question_files import (
    question_messages,
    read_questions,
    read_worked_examples,
    sample_questions,
)


def test_every_documented_form_becomes_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '\ufeff{"id": "a", "prompt": "Why?"}\n\n'
        '{"question": "Where?", "choices": {"label": ["A", "B"], "text": ["here", "there"]},'
        ' "answerKey": "B"}\n'
        '{"problem": "1 + 1?", "solution": "\\\\boxed{2}"}\n',
        encoding="utf-8",
    )
    first, second, third = read_questions(file)
    assert (first.name, first.prompt) == ("a", "Why?")
    assert second.name == f"{file}, row 3"
    assert second.prompt == "Where?\nA. here\nB. there"
    assert third.prompt == "1 + 1?"
    assert question_messages(second) == [
        {"role": "user", "content": f"{second.prompt}\n\n{second.form}"}
    ]
    assert "answerKey" not in second.prompt
    assert "boxed{2}" not in third.prompt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "Why?"', "row 2: no JSON"),
        ("[1]", "row 2: a row is one JSON object"),
        ('{"prompt": " "}', "row 2: `prompt` must be a text"),
        ('{"prompt": 3}', "row 2: `prompt` must be a text"),
        ('{"question": "Why?"}', "row 2: `prompt` must be a text"),
        ('{"question": "Why?", "choices": ["a"]}', "row 2: `choices` needs"),
        ('{"question": "?", "choices": {"label": ["A"], "text": []}}', "row 2: `choices` needs"),
        ('{"problem": null}', "row 2: `problem` must be a text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"prompt": "Why?"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        read_questions(file)


def test_files_that_hold_nothing_to_ask_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, said in (("none", "No such file"), ("empty", "there are none"), ("binary", "UTF-8")):
        with pytest.raises(UsageError, match=f"{name}.*{said}"):
            read_questions(tmp_path / name)


def test_worked_examples_are_earlier_turns_that_show_the_form() -> None:
    examples = read_worked_examples(bench_file("questions", "examples.jsonl"), 2)
    question = read_questions(bench_file("questions", "everyday.jsonl"))[0]
    turns = question_messages(question, examples)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[1]["content"] == examples[0].worked
    assert turns[-1]["content"] == question.prompt


def test_our_questions_have_one_right_answer_each() -> None:
    questions = read_questions(bench_file("questions", "everyday.jsonl"))
    examples = read_worked_examples(bench_file("questions", "examples.jsonl"), 4)
    assert len({each.fingerprint for each in (*questions, *examples)}) == 36
    for each in (*questions, *examples):
        assert each.answer in list("ABCDE")
        assert len({text for _, text in each.choices}) == 5
    for each in examples:
        assert grade(each, each.worked or "").strict
    # No label is right so often that it could be guessed.
    counts = [sum(each.answer == label for each in questions) for label in "ABCDE"]
    assert max(counts) <= len(questions) / 3


def test_more_questions_are_the_same_and_others() -> None:
    questions = read_questions(bench_file("questions", "everyday.jsonl"))
    assert sample_questions(questions, 10) == sample_questions(questions, 20)[:10]
    assert sorted(each.name for each in sample_questions(questions, 99)) == sorted(
        each.name for each in questions
    )
