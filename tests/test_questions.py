"""Files of questions: what is understood, and what is said of rows that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxroute.errors import UsageError
from mlxroute.questions import read_questions


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
    assert second.prompt.startswith("Where?\nA. here\nB. there\n\n")
    assert third.prompt.startswith("1 + 1?\n\n")
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
