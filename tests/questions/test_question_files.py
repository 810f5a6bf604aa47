"""Question files: the rows that can be read, and the errors for those that cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlxroute.cli.folders import find_bench_file
from mlxroute.errors import UsageError
from mlxroute.questions.grading import grade
from mlxroute.questions.question_files import (
    AnswerKind,
    Question,
    hash_examples,
    question_messages,
    read_questions,
    read_worked_examples,
    sample_files,
    sample_questions,
)


def test_every_documented_row_form_becomes_a_prompt(tmp_path: Path) -> None:
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
        {"role": "user", "content": f"{second.prompt}\n\n{second.instruction}"}
    ]
    assert "answerKey" not in second.prompt
    assert "boxed{2}" not in third.prompt


def _choices(labels: object, texts: object) -> str:
    """Return a row with these choices, whose right answer is A."""
    row = {"question": "?", "choices": {"label": labels, "text": texts}, "answerKey": "A"}
    return json.dumps(row)


def test_labels_and_texts_of_choices_may_be_numbers(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    row = {"question": "?", "choices": {"label": [1, 2], "text": [10**400, 4.5]}, "answerKey": 2}
    file.write_text(json.dumps(row))
    (question,) = read_questions(file)
    assert (question.choices, question.answer) == ((("1", f"1{'0' * 400}"), ("2", "4.5")), "2")


def _function(test: str) -> str:
    return json.dumps({"prompt": "def f(x):", "entry_point": "f", "test": test})


@pytest.mark.parametrize(
    ("number", "text"),
    [("0.00001", "0.00001"), ("1e22", "1" + 22 * "0"), ("-2.5E-7", "-0.00000025"), ("4.0", "4.0")],
)
def test_an_answer_that_is_a_small_or_large_number_is_a_number(
    number: str, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"prompt": "?", "answer": {number}}}')
    (question,) = read_questions(file)
    assert (question.kind, question.answer) == (AnswerKind.NUMBER, text)
    assert grade(question, f"It is {text}.").lenient


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Why?"', "row 2: not valid JSON"),
        ("[1]", "row 2: a row must be a JSON object"),
        ('{"prompt": " "}', "row 2: `prompt` must be a non-empty string"),
        ('{"prompt": 3}', "row 2: `prompt` must be a non-empty string"),
        ("{}", "row 2: a row needs `prompt`, `problem`, or `question` and `choices`"),
        ('{"question": "Why?"}', "row 2: a row needs `prompt`, `problem`, or `question` and `ch"),
        ('{"question": "?", "answer": 3}', "row 2: a row needs `prompt`, `problem`, or `quest"),
        (
            '{"question": "What?", "answer": "so\\n#### 72"}',
            "row 2: this is GSM8K as published; .*`python bench/question_sets.py gsm8k NEW",
        ),
        ('{"question": "Why?", "choices": ["a"]}', "row 2: `choices` needs"),
        ('{"question": "?", "choices": {"label": ["A"], "text": []}}', "row 2: `choices` needs"),
        ('{"question": "?", "choices": null}', "row 2: a row needs `prompt`, `problem`, or `q"),
        (_choices("AB", "xy"), "row 2: `choices` needs a `label` list and a `text` list"),
        (_choices({"A": 1}, {"x": 1}), "row 2: `choices` needs a `label` list and a `text` list"),
        (_choices([], []), "row 2: `choices` needs a `label` list and a `text` list, not empty"),
        (_choices(["A", "B"], ["x"]), "row 2: `choices` needs as many items in `label` as in"),
        (_choices([None], [{}]), "row 2: `choices` needs non-empty strings or finite numbers in"),
        (_choices(["A"], [" "]), "row 2: `choices` needs non-empty strings or finite numbers in"),
        (_choices([True], ["x"]), "row 2: `choices` needs non-empty strings or finite numbers in"),
        (_choices(["i", "ii"], ["x", "y"]), "row 2: a `label` must be a letter or a whole number"),
        (_choices(["A", "A"], ["x", "y"]), "row 2: `choices` needs a different `label` for each"),
        (_choices(["a", "A"], ["x", "y"]), "row 2: `choices` needs a different `label` for each"),
        (_choices([1, "1"], ["x", "y"]), "row 2: `choices` needs a different `label` for each"),
        ('{"prompt": "?", "answer": 1e999}', "row 2: `answer` must be .* or a finite number"),
        ('{"prompt": "?", "answer": true}', "row 2: `answer` must be .* or a finite number"),
        ('{"problem": null}', "row 2: a row needs `prompt`, `problem`, or `question` and `ch"),
        ('{"problem": " "}', "row 2: `problem` must be a non-empty string"),
        ('{"problem": "?", "answer": "a pie"}', "`answer` to a `problem` must be a number, and n"),
        (r'{"problem": "?", "solution": "\\boxed{x^2}"}', "row 2: `solution` must box a number"),
        (r'{"problem": "?", "solution": "\\boxed{\\frac{1}{2}}"}', "row 2: `solution` must box"),
        (r'{"problem": "?", "solution": "\\boxed{7} \\boxed{}"}', "row 2: `solution` must box"),
        (_function("def check(:"), r"row 2: `test` is not a Python program \(.*, line 1\)"),
        (_function("assert f(1)"), "row 2: `test` must define `check`, which is called with the"),
    ],
)
def test_an_invalid_row_is_named_in_the_error(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"prompt": "Why?"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_questions(file)


def test_a_boxed_number_may_be_written_in_latex(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        r'{"problem": "?", "solution": "\\boxed{1} \\boxed{1{,}000\\text{ m}}"}'
        "\n"
        r'{"problem": "?", "solution": "no box"}'
        "\n"
    )
    boxed, unboxed = read_questions(file)
    assert (boxed.kind, boxed.answer) == (AnswerKind.NUMBER, r"1{,}000\text{ m}")
    assert grade(boxed, "so it is 1000").lenient
    assert grade(boxed, r"\boxed{1{,}000\text{ m}}").strict
    assert unboxed.answer is None


def test_a_problem_may_have_its_number_as_answer(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        r'{"problem": "?", "solution": "So \\boxed{7}.", "answer": 8}'
        "\n"
        r'{"problem": "?", "solution": "no box", "answer": "1,000"}'
        "\n"
    )
    assert [question.answer for question in read_questions(file)] == ["7", "1,000"]


def test_keys_with_null_count_as_absent(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"prompt": "Why?", "problem": null, "choices": null, "entry_point": null, "cot": null}\n'
    )
    (question,) = read_questions(file)
    assert (question.kind, question.prompt) == (AnswerKind.TEXT, "Why?")
    assert question.worked_answer is None


def test_a_file_without_questions_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("none", "No such file"),
        ("empty", "has no questions"),
        ("binary", "UTF-8"),
    ):
        with pytest.raises(UsageError, match=f"{name}.*{message}"):
            read_questions(tmp_path / name)


def test_worked_examples_become_earlier_turns() -> None:
    examples = read_worked_examples(find_bench_file("questions", "choice_examples.jsonl"), 2)
    question = read_questions(find_bench_file("questions", "everyday.jsonl"))[0]
    messages = question_messages(question, examples)
    roles = [message["role"] for message in messages]
    assert roles == ["system"] + ["user", "assistant"] * 2 + ["user"]
    assert messages[0]["content"] == question.instruction
    assert messages[2]["content"] == examples[0].worked_answer
    assert messages[-1]["content"] == question.prompt


def test_the_shipped_questions_have_one_correct_answer_each() -> None:
    questions = read_questions(find_bench_file("questions", "everyday.jsonl"))
    examples = read_worked_examples(find_bench_file("questions", "choice_examples.jsonl"), 4)
    assert len({question.fingerprint for question in (*questions, *examples)}) == 36
    for question in (*questions, *examples):
        assert question.answer in list("ABCDE")
        assert len({text for _, text in question.choices}) == 5
    for example in examples:
        assert grade(example, example.worked_answer or "").strict
    # No label is correct so often that guessing it would pay.
    counts = [sum(question.answer == label for question in questions) for label in "ABCDE"]
    assert max(counts) <= len(questions) / 3


def test_a_prompt_is_sampled_once_however_often_it_occurs(tmp_path: Path) -> None:
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n')
    # White space makes no other question.
    other.write_text('{"prompt": "b\\n"}\n{"prompt": "c  d"}\n{"prompt": " c\\td"}\n')
    sampled = sample_files([file, other], 9)
    assert sorted(question.wording for question in sampled) == ["a", "b", "c d"]
    (b,) = (question for question in sampled if question.prompt == "b")
    assert str(file) in b.name


def test_worked_examples_are_told_apart_by_what_they_say() -> None:
    example = Question("a", "say a", worked_answer="It is a.")
    others = [replace(example, prompt="say b"), replace(example, worked_answer="It is b.")]
    assert len({hash_examples(items) for items in ([], [example], *[[i] for i in others])}) == 4
    assert hash_examples([replace(example, name="b")]) == hash_examples([example])


def test_a_smaller_sample_is_the_start_of_a_larger_one() -> None:
    questions = read_questions(find_bench_file("questions", "everyday.jsonl"))
    assert sample_questions(questions, 10) == sample_questions(questions, 20)[:10]
    names = sorted(question.name for question in questions)
    assert sorted(question.name for question in sample_questions(questions, 99)) == names


def test_a_sample_has_as_many_different_prompts_as_were_asked_for() -> None:
    questions = [Question(str(i), f"say {i % 4}") for i in range(12)]
    for count in range(1, 6):
        prompts = [question.prompt for question in sample_questions(questions, count)]
        assert len(prompts) == len(set(prompts)) == min(count, 4)
