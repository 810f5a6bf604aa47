"""Conversations, and the files they are saved in."""

from __future__ import annotations

import json
import resource
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.conversation import Conversation
from mlxroute.errors import UsageError
from mlxroute.ledger import Secrets
from tests.support.documents import make_document

text = st.text()


def saved(path: Path) -> dict[str, Any]:
    Conversation("Be terse.", []).save(path)
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


def test_messages_start_with_the_system_prompt_and_alternate() -> None:
    conversation = Conversation(system="Be terse.")
    conversation.add("Hi", "Hello")
    assert conversation.messages == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]


def test_messages_are_a_copy() -> None:
    conversation = Conversation()
    conversation.add("Hi", "Hello")
    conversation.messages[0]["content"] = "changed"
    assert conversation.messages[0]["content"] == "Hi"


@given(st.none() | text, st.lists(st.tuples(text, text)))
def test_a_loaded_conversation_equals_the_saved_one(
    system: str | None, turns: list[tuple[str, str]]
) -> None:
    conversation = Conversation(system)
    for user, assistant in turns:
        conversation.add(user, assistant)
    with tempfile.TemporaryDirectory() as folder:
        conversation.save(Path(folder) / "chat.json")
        assert Conversation.load(Path(folder) / "chat.json") == conversation


def test_the_file_is_private_and_readable_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = Conversation()
    conversation.add("日本語?", "はい")
    conversation.save(path)
    conversation.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "日本語?" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    Conversation("old").save(tmp_path / "real.json")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    Conversation("new").save(link)
    assert link.is_symlink()
    assert Conversation.load(tmp_path / "real.json").system == "new"


def test_a_failed_save_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    Conversation("old").save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UsageError, match=r"cannot save to .*chat\.json: File too large"):
            Conversation("x" * 5000).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Conversation.load(path).system == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_never_replaces_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a saved conversation"):
        Conversation().save(path)
    assert path.read_text() == "mine"


def test_a_name_as_long_as_the_file_system_allows_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / ("\u65e5" * 83 + ".json")
    Conversation("Be terse.").save(path)
    assert Conversation.load(path).system == "Be terse."


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot save to .*no is not a folder to write to"):
        Conversation().save(tmp_path / "no" / "chat.json")
    with pytest.raises(UsageError, match=r"cannot be read: No such file or directory"):
        Conversation.load(tmp_path / "no" / "chat.json")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "~nobody-of-this-name/chat.json"])
def test_an_impossible_file_name_is_an_error(name: str) -> None:
    with pytest.raises(UsageError):
        Conversation().save(Path(name))
    with pytest.raises(UsageError):
        Conversation.load(Path(name))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"[" * 100_000, b"[]", b"null", b"{}"],
    ids=["empty", "text", "deep", "list", "null", "object"],
)
def test_a_file_that_is_not_a_conversation_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"chat\.json is not a"):
        Conversation.load(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, '"version" is 2, not 1'),
        ({"model": "x"}, "missing or unknown key: model"),
        ({"system": 3}, '"system" is neither text nor null'),
        ({"messages": {}}, '"messages" is not a list'),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "question and answer pairs"),
        ({"messages": ["Hi", "Hello"]}, 'message 1 does not have just "role" and "content"'),
        (
            {"messages": [{"role": "assistant", "content": "Hi"}] * 2},
            "message 1 has role 'assistant', not \"user\"",
        ),
        ({"messages": [{"role": "user", "content": None}] * 2}, '"content" of message 1'),
        ({"messages": [{"role": "user", "content": "\ud800"}] * 2}, '"content" of message 1'),
    ],
)
def test_a_damaged_conversation_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(saved(path) | change))
    with pytest.raises(UsageError) as caught:
        Conversation.load(path)
    assert complaint in str(caught.value)


def test_without_documents_the_file_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = Conversation("Be terse.")
    conversation.add("Hi", "Hello")
    conversation.add("And?", "Bye", make_document(unsure=()))
    conversation.save(path)
    assert path.read_text() == (
        '{\n "format": "mlxroute conversation",\n "version": 1,\n "system": "Be terse.",\n'
        ' "messages": [\n  {\n   "role": "user",\n   "content": "Hi"\n  },\n'
        '  {\n   "role": "assistant",\n   "content": "Hello"\n  },\n'
        '  {\n   "role": "user",\n   "content": "And?"\n  },\n'
        '  {\n   "role": "assistant",\n   "content": "Bye"\n  }\n ]\n}\n'
    )


def test_documents_of_routed_answers_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = Conversation()
    conversation.add("Hi", "Hello")
    conversation.add("And?", "Bye", make_document())
    conversation.save(path)
    assert Conversation.load(path) == conversation
    assert len(json.loads(path.read_bytes())["answers"]) == 2


def test_no_part_of_the_file_has_the_key(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    secrets = Secrets()
    secrets.add("sk-very-secret")
    conversation = Conversation("My key: sk-very-secret.")
    conversation.add("Is sk-very-secret long?", "sk-very-secret is", make_document())
    conversation.save(path, redact=secrets.redact_json)
    loaded = Conversation.load(path)
    assert "secret" not in path.read_text(encoding="utf-8")
    assert loaded.system == "My key: [key]."
    assert [turn["content"] for turn in loaded.turns] == ["Is [key] long?", "[key] is"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], '"answers" is not a list with an item for each answer'),
        ({}, '"answers" is not a list'),
        ([{}], r'answers\[0\] is not an answer document: it has no "format"'),
    ],
)
def test_wrong_documents_are_refused(answers: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    conversation = Conversation()
    conversation.add("Hi", "Hello")
    conversation.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "answers": answers}))
    with pytest.raises(UsageError, match=message):
        Conversation.load(path)
