"""Text from outside: any bytes give a value or one of our errors, in bounded time and memory."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxroute import untrusted_text
from mlxroute.catalog import Catalog
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.config import Settings, load_settings, read_key, read_never_send
from mlxroute.config.client_keys import read_client_keys
from mlxroute.config.settings import declared_settings
from mlxroute.conversation import Conversation
from mlxroute.errors import ConfigError, MlxRouteError, UsageError
from mlxroute.large.negotiation.verdict_file import VerdictFile
from mlxroute.questions.demo_question import read_demo_question
from mlxroute.questions.question_files import read_questions
from mlxroute.recorded.record_file import append_records, read_records
from mlxroute.tokenizers.fast_tokenizer import read_plain_tokenizer_config
from mlxroute.untrusted_text import MalformedText, TextFile, parse_json, parse_toml
from mlxroute.weights.store import Store

Reader = Callable[[Path], Any]


def read_key_file(path: Path) -> Any:
    path.chmod(0o600)
    return read_key(Settings(key_file=str(path)), {})


def read_client_key_file(path: Path) -> Any:
    path.chmod(0o600)
    return read_client_keys(Settings(client_key_file=str(path)), {})


def read_catalog(path: Path) -> Any:
    path.rename(path.with_suffix(".toml"))
    return Catalog.load(path.parent)


def read_ranks(path: Path) -> Any:
    folder = path.parent / "ranks"
    folder.mkdir(exist_ok=True)
    path.rename(folder / "tiny.json")
    return ScoreRanks.find("tiny", path.parent)


def read_tokenizer_config(path: Path) -> Any:
    path.rename(path.with_name("tokenizer_config.json"))
    return read_plain_tokenizer_config(path.parent)


def read_manifest(path: Path) -> Any:
    folder = path.parent / "models" / "m"
    folder.mkdir(parents=True)
    path.rename(folder / "mlxroute-manifest.json")
    manifest = Store(path.parent).read_manifest("m", name="m")
    return manifest and manifest.size_bytes


READERS: dict[str, tuple[Reader, bytes]] = {
    "config": (
        lambda path: load_settings({}, environ={}, path=path),
        b'budget = "7%"\nstop = ["a", "b"]\ntemperature = 0.5\nstrict = true\n',
    ),
    "key": (read_key_file, b"sk-1234\n"),
    "client keys": (read_client_key_file, b"0123456789abcdef\nfedcba9876543210\n"),
    "never-send": (
        lambda path: read_never_send(Settings(never_send_file=(str(path),))),
        b"# secrets\n\\bcaf\xc3\xa9\n[a-z]+\n",
    ),
    "questions": (read_questions, b'{"prompt": "Why?", "answer": 3}\n{"problem": "1 + 1?"}\n'),
    "demo question": (read_demo_question, b'{"question": "a", "answers": ["b"]}'),
    "conversation": (
        Conversation.load,
        b'{"format": "mlxroute conversation", "version": 1, "system": null, "messages": []}',
    ),
    "catalogue": (read_catalog, b'[[models]]\nname = "a"\nparameters = 3\n'),
    "ranks": (
        read_ranks,
        b'{"small": "a", "data": "b", "positions": 1, "quantiles": {"entropy": [0, 1]}}',
    ),
    "manifest": (
        read_manifest,
        b'{"version": 1, "name": "m", "source": "s", "fingerprint": "", "files":'
        b' {"a": {"size": 1, "sha256": "00", "mtime_ns": 1}}}',
    ),
    "verdicts": (
        lambda path: VerdictFile(path).load("http://h/v1", None),
        b'{"format": 1, "verdicts": {"http://h/v1 ": {"base_url": "http://h/v1"}}}',
    ),
    "tokenizer config": (
        read_tokenizer_config,
        b'{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a", "chat_template": "b"}',
    ),
    "records": (
        lambda path: list(read_records(path, lambda item: item["key"])),
        b'{"key": "a", "score": NaN}\n{"key": "b"}\n',
    ),
}

PARTS = st.sampled_from(
    [
        *(b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\r", b"\n", b"\r\n", b"\xe2\x80\xa8", b"\xc2\x85"),
        *(b'"', b"[" * 300, b"{" * 300, b"9" * 5000, b"1e999", b"NaN", b"-inf", b"\\ud800", b"("),
        *(b"a." * 1500, b"= 3", b"#", b"\x1b[2J", b"\xe9", b"key", b"null", b"true", b",", b":"),
    ]
)


@st.composite
def contents(draw: st.DrawFn, valid: bytes) -> bytes:
    """Any bytes, or a valid file with parts cut out and others put in."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        data = data[:start] + draw(PARTS) + data[end if draw(st.booleans()) else start :]
    return data


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_give_a_value_or_one_of_our_errors(
    name: str, data: st.DataObject, tmp_path: Path
) -> None:
    read, valid = READERS[name]
    # Many of pytest's own folders are slow to make.
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "file"
    path.write_bytes(data.draw(contents(valid)))
    began_s = time.monotonic()
    with suppress(MlxRouteError):
        read(path)
    assert time.monotonic() - began_s < 5


@given(
    variable=st.sampled_from([item.variables[0] for item in declared_settings().values()]),
    value=st.binary(max_size=40) | PARTS,
)
def test_any_environment_value_gives_settings_or_one_of_our_errors(
    variable: str, value: bytes
) -> None:
    environ = {variable: os.fsdecode(value)}
    message = variable
    try:
        loaded = load_settings({}, environ=environ, path=Path("none"))
    except ConfigError as error:
        message = str(error)
    else:
        # Nothing in it may fail when it is encoded later.
        repr(loaded).encode()
    assert variable in message


@pytest.mark.parametrize(
    "name", ["config", "never-send", "questions", "demo question", "conversation", "records"]
)
@pytest.mark.parametrize("kind", ["folder", "pipe", "large", "endless"])
def test_what_is_no_readable_file_is_one_error(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted_text, "_PIPE_LIMIT_S", 0.1)
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 5 * 2**30)
    else:
        path.symlink_to("/dev/zero")
    began_s = time.monotonic()
    with pytest.raises(MlxRouteError, match="file"):
        READERS[name][0](path)
    assert time.monotonic() - began_s < 10


def test_a_name_with_a_nul_character_is_one_error() -> None:
    with pytest.raises(UsageError, match="its name has a NUL character"):
        read_questions(Path("a\0b"))


def test_rows_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    separators = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
    path.write_bytes(f"\ufeffa{separators}b\r\n\n\ufeffc".encode())
    file = TextFile(path, "the file", max_bytes=100)
    assert list(file.rows()) == [(1, f"a{separators}b"), (2, ""), (3, "c")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_question_may_have_unicode_line_separators(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt":"one{separator}two"}}\n{{"prompt":"three"}}\n', encoding="utf-8")
    assert [question.prompt for question in read_questions(path)] == [
        f"one{separator}two",
        "three",
    ]


def test_records_may_have_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes('{"key": "a\u2028b"}\n{"key": "c\x85d"}\n{"key": "half'.encode())
    assert list(read_records(path, lambda item: item["key"])) == ["a\u2028b", "c\x85d"]
    append_records(path, [{"key": "e"}])
    assert list(read_records(path, lambda item: item["key"])) == ["a\u2028b", "c\x85d", "e"]


def test_a_damaged_record_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "records"
    for text, reason in [
        ('{"key": "a"}\n[3]\n', "row 2: it is not such a record; delete the row or the file"),
        ('{"key": "a"}\n{"key"\n', "row 2: not valid JSON .*; delete the row or the file"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=reason):
            list(read_records(path, lambda item: item["key"]))


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\ufeff"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, mark: str) -> None:
    config, key = tmp_path / "config.toml", tmp_path / "key"
    config.write_text(f"{mark}max_tokens = 3\r\n", encoding="utf-8")
    key.write_text(f"{mark}sk-x\r\n", encoding="utf-8")
    key.chmod(0o600)
    assert load_settings({}, environ={}, path=config).max_tokens == 3
    secret = read_key(Settings(key_file=str(key)), {})
    assert secret is not None
    assert secret.reveal() == "sk-x"


def test_a_text_in_another_encoding_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        path.write_text("\ufeffseed = 3\n", encoding)
        name = encoding[:6].upper()
        with pytest.raises(ConfigError, match=f"it is {name} text; save it as UTF-8"):
            load_settings({}, environ={}, path=path)


def test_a_small_file_takes_little_memory_however_large_it_may_be(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x" * 3_000_000)
    tracemalloc.start()
    try:
        text = TextFile(file, "the file", max_bytes=2**30).read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text) == 3_000_000
    assert peak < 20_000_000


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(b'{"prompt": "on')
            time.sleep(0.05)
            pipe.write(b'e"}\n')

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert [question.prompt for question in read_questions(path)] == ["one"]
    finally:
        writer.join()


def test_the_null_device_is_an_empty_file() -> None:
    assert load_settings({}, environ={}, path=Path(os.devnull)) == Settings()


def test_a_row_that_is_too_long_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted_text, "MAX_ROW_BYTES", 2**20)
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + b"a" * 2**21)
    with pytest.raises(UsageError, match="row 2: it is longer than 1 MiB"):
        read_questions(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN is not a JSON number"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
        ('["\\ud800"]', "half a surrogate pair"),
        ("[" * 102 + "]" * 102, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("9" * 5000, "too many digits"),
        ("{", "not valid JSON"),
        ('"', r"not valid JSON \(Unterminated string starting at column 1\)"),
        ('["\t"]', r"not valid JSON \(Invalid control character at column 3\)"),
        ('{"a": 1,\n "b": x}\n', r"not valid JSON \(Expecting value at line 2, column 7\)"),
    ],
)
def test_json_that_parsers_disagree_on_is_refused(text: str, reason: str) -> None:
    with pytest.raises(MalformedText, match=reason):
        parse_json(text)


def test_what_python_writes_is_read_where_it_is_our_own() -> None:
    text = json.dumps(["\ud800", -float("inf")])
    assert parse_json(text, strict=False) == ["\ud800", -float("inf")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 20_000, "nested"),
        ("a = " + "9" * 5000, "too many digits"),
        ("a." * 2000 + "b = 1", "more than 1000 parts"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_toml_that_takes_long_or_too_much_is_refused(text: str, reason: str) -> None:
    with pytest.raises(MalformedText, match=reason):
        parse_toml(text)
