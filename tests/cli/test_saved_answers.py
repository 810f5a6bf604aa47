"""`ask --save`, `show` and `replay` on a tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxroute.answers.document_file import check_target
from mlxroute.cli import main
from mlxroute.cli.folders import hash_file
from mlxroute.conversation import Conversation
from mlxroute.errors import UsageError
from mlxroute.safe_text import printable
from mlxroute.small.mlp_head import SIGNAL_COUNT
from mlxroute.tokenizers.template_sandbox import at_time
from tests.support.connected_clients import legacy
from tests.support.loopback import Loopback, Reply
from tests.support.negotiated import honest
from tests.support.tiny import make_tiny_model

KEY = "sk-abcdef123456"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", context=200)


@pytest.fixture(scope="module")
def recorded() -> dict[str, bytes]:
    """Documents that the first test which needs one records, in its own environment."""
    return {}


def save_answer(tiny: Path, file: Path, question: str, *routing: str, tokens: int) -> None:
    """Let `ask` save an answer in which the large model always says "a"."""
    with Loopback(honest(lambda request: Reply.of(legacy("a")), name="huge")) as server:
        routed = ["--small", str(tiny), "--large", server.url, *routing]
        limited = ["--max-tokens", str(tokens), "--save", str(file)]
        assert main(["ask", *routed, *limited, question]) == 0


@pytest.fixture
def saved(
    tiny: Path, tmp_path: Path, recorded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the file of an answer whose every position was asked for."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    file = tmp_path / "answer.json"
    if "saved" not in recorded:
        save_answer(tiny, file, f"is {KEY} a key?", "--threshold", "-inf", tokens=4)
        recorded["saved"] = file.read_bytes()
    return write_private(file, recorded["saved"])


@pytest.fixture
def plain(tiny: Path, tmp_path: Path, recorded: dict[str, bytes]) -> Path:
    """Return the file of an answer to a question without a key."""
    file = tmp_path / "answer.json"
    if "plain" not in recorded:
        save_answer(tiny, file, "hello", "--budget", "50%", tokens=9)
        recorded["plain"] = file.read_bytes()
    return write_private(file, recorded["plain"])


def write_private(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    file.chmod(0o600)
    return file


def read(file: Path) -> Any:
    return json.loads(file.read_bytes())


def test_a_saved_answer_is_private_and_holds_no_secret(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    file = tmp_path / "answer.json"
    save_answer(tiny, file, f"is {KEY} a key?", "--threshold", "-inf", tokens=4)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert KEY not in file.read_text()
    document = read(file)
    assert document["models"]["large"] == "huge"
    assert document["messages"] == [{"role": "user", "content": "is [key] a key?"}]
    assert [token["decision"] for token in document["tokens"]] == ["replaced"] * 4


def test_the_user_and_password_of_an_address_are_not_saved(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    with Loopback(honest(lambda request: Reply.of(legacy("a")), name="huge")) as server:
        address = server.url.replace("//", "//someone:password@")
        routed = ["--small", str(tiny), "--large", address, "--threshold", "-inf"]
        assert main(["ask", *routed, "--max-tokens", "2", "--save", str(file), "hi"]) == 0
    text = file.read_text()
    assert not [secret for secret in ("someone", "password") if secret in text]


def test_a_stopped_answer_and_a_failed_one_are_saved(
    tiny: Path, tmp_path: Path, short_retry_pauses: None
) -> None:
    file = tmp_path / "answer.json"
    routed = ["--small", str(tiny), "--large", "http://127.0.0.1:9/v1", "--threshold", "-inf"]
    assert main(["ask", *routed, "--max-tokens", "3", "--save", str(file), "hi"]) == 0
    assert [token["decision"] for token in read(file)["tokens"]] == ["unchecked"] * 3


def test_an_interrupt_while_the_connections_close_does_not_lose_the_answer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(session: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxroute.cli.session.Session.close", interrupt)
    file = tmp_path / "answer.json"
    arguments = ["--small", str(tiny), "--max-tokens", "3", "--save", str(file)]
    assert main(["ask", *arguments, "hi"]) == 130
    assert len(read(file)["tokens"]) == 3


def test_a_file_of_another_kind_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert main(["ask", "--small", "no/such/model", "--save", str(file), "hi"]) == 2
    assert "is not a saved answer; choose another name" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_show_prints_the_answer(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "> is [key] a key?" in out
    assert '  large  "a"' in out


def test_show_keeps_lines_whole_in_a_file_or_pipe(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(saved)
    question = "why " * 60 + "?"
    document["messages"][0]["content"] = question
    document["tokens"][0]["large"]["text"] = "two words"
    saved.write_text(json.dumps(document))
    monkeypatch.setenv("COLUMNS", "40")
    capsys.readouterr()
    assert main(["show", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"> {question}" in lines
    assert any(line.startswith('  large  "two words"') for line in lines)


@pytest.mark.parametrize("columns", ["0", "-3", "\u00b2", "x"])
def test_an_unusable_width_in_the_environment_is_ignored(
    columns: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["show", str(saved)]) == 0
    assert "key?" in capsys.readouterr().out


def test_show_writes_a_page_and_a_picture(saved: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    assert main(["show", str(saved), "--html", str(page), "--svg", str(picture)]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert picture.read_text().startswith("<svg")
    assert {stat.S_IMODE(file.stat().st_mode) for file in (page, picture)} == {0o600}


def test_an_answer_that_spelled_the_key_is_not_replayed(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = read(plain)
    value["tokens"][1] |= {"id": -1, "text": "[key]"}
    plain.write_text(json.dumps(value), encoding="utf-8")
    assert main(["replay", str(plain)]) == 2
    assert "spells the key, which is not saved, so it cannot be replayed" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--html", "--svg"])
def test_show_does_not_replace_the_answer(
    flag: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved.read_bytes()
    link = saved.with_name("link")
    link.symlink_to(saved)
    for target in (saved, link):
        assert main(["show", str(saved), flag, str(target)]) == 2
        assert f"is the saved answer; choose another name ({flag})" in capsys.readouterr().err
    assert saved.read_bytes() == before


def test_a_replay_does_not_replace_its_recording(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plain.read_bytes()
    link = plain.with_name("link")
    link.symlink_to(plain)
    for target in (plain, link):
        assert main(["replay", str(plain), "--save", str(target)]) == 2
        assert f"{target} is the saved answer; choose another name (--save)" in (
            capsys.readouterr().err
        )
    assert plain.read_bytes() == before


def test_show_replaces_only_its_own_pages_and_pictures(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    arguments = ["show", str(saved), "--html", str(page), "--svg", str(picture)]
    others = {
        page: b"<!DOCTYPE html>\n<html>",
        picture: b"<svg xmlns='http://www.w3.org/2000/svg'>",
    }
    for file, flag in ((page, "--html"), (picture, "--svg")):
        for content in (others[file], b"\xff", b""):
            file.write_bytes(content)
            assert main(arguments) == 2
            error = capsys.readouterr().err
            assert f"{file} exists and is not a p" in error
            assert f"; choose another name ({flag})" in error
            assert file.read_bytes() == content
            # Neither is written if one of them cannot be.
            assert not (page.exists() and picture.exists())
        file.unlink()
    for _ in range(2):
        assert main(arguments) == 0


def test_a_page_and_a_picture_need_two_names(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.html"
    assert main(["show", str(saved), "--html", str(file), "--svg", f"{tmp_path}/./a.html"]) == 2
    assert f"--html and --svg both name {file}; choose two names" in capsys.readouterr().err
    assert not file.exists()


def test_a_name_that_is_too_long_is_one_clear_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / (letter * 400)) for letter in "xy"]
    assert main(["show", str(saved), "--html", files[0], "--svg", files[1]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot save to {files[0]}: File name too long")


def test_only_regular_files_are_replaced(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["show", str(saved), "--html", str(pipe)]) == 2
    assert f"cannot save to {pipe}: it is not a regular file" in capsys.readouterr().err
    # It is not read either, which would last until something writes to it.
    with pytest.raises(UsageError, match="pipe: it is not a regular file"):
        check_target(pipe)
    with pytest.raises(UsageError, match="pipe: it is not a regular file"):
        Conversation().save(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_behind_a_link_without_a_name_is_refused() -> None:
    reader, writer = os.pipe()
    refusal = pytest.raises(UsageError, match=f"/dev/fd/{writer}: it is not a regular file")
    with open(reader), open(writer, "w"), refusal:
        check_target(Path(f"/dev/fd/{writer}"))


@pytest.mark.parametrize("token_id", [10**12, 2**31, 100_000, -1])
def test_a_replay_refuses_tokens_that_the_small_model_does_not_have(
    token_id: int, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(plain)
    document["replies"][0]["tokens"][0]["ids"] = [token_id]
    plain.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["replay", str(plain)]) == 2
    assert f"has the token id {token_id}," in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "replay"])
def test_a_file_that_is_no_answer_is_one_error(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}")
    assert main([command, str(file)]) == 2
    assert "x.json is not a saved answer" in capsys.readouterr().err
    assert main([command, str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("mode", ["wait", "overlap", "hedge", "auto"])
def test_a_replay_needs_no_server(
    mode: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    again = tmp_path / "again.json"
    assert main(["replay", str(plain), "--mode", mode, "--save", str(again)]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == printable(read(plain)["summary"]["text"])
    assert "the answer is the recorded one" in captured.err
    assert "not recorded" not in captured.err
    assert [t["id"] for t in read(again)["tokens"]] == [t["id"] for t in read(plain)["tokens"]]
    assert read(again)["summary"]["requests"] == 0


def test_a_replay_names_the_positions_that_need_another_reply(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = read(plain)["tokens"]
    asked = [token["index"] for token in tokens if token["large"] or not token["checked"]]
    capsys.readouterr()
    assert main(["replay", str(plain), "--threshold", "-inf"]) == 0
    err = capsys.readouterr().err
    first = next(number for number in range(9) if number not in asked)
    assert "needed a reply that was not recorded" in err
    assert " not made (no recorded reply)" in err
    assert f"token: {first + 1}" in err
    assert main(["replay", str(plain), "--threshold", "inf"]) == 0
    assert "the answer differs from the recorded one from token" in capsys.readouterr().err


def test_the_replay_of_a_stopped_answer_stops_there(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(plain)
    document["summary"]["finish_reason"] = "cancelled"
    document["tokens"] = document["tokens"][:5]
    document["replies"] = [reply for reply in document["replies"] if reply["after"] < 5]
    plain.write_text(json.dumps(document))
    again = tmp_path / "again.json"
    capsys.readouterr()
    assert main(["replay", str(plain), "--save", str(again)]) == 0
    err = capsys.readouterr().err
    assert "the answer is the recorded one\n" in err
    assert "the recorded answer was stopped after 5 tokens, and so is the replay\n" in err
    assert [t["id"] for t in read(again)["tokens"]] == [t["id"] for t in document["tokens"]]
    # The copy ends there too.
    assert main(["replay", str(again)]) == 0
    assert "the answer is the recorded one\n" in capsys.readouterr().err
    plain.write_text(json.dumps({**document, "tokens": [], "replies": []}))
    assert main(["replay", str(plain)]) == 2
    assert "was stopped before its first token" in capsys.readouterr().err


def test_a_replay_renders_the_prompt_at_the_time_of_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dated = make_tiny_model(tmp_path / "dated", context=200)
    config = json.loads((dated / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y %H:%M') }}" + config["chat_template"]
    (dated / "tokenizer_config.json").write_text(json.dumps(config))
    file = tmp_path / "answer.json"
    day = datetime(2024, 5, 6, 23, 30)
    with at_time(day):
        save_answer(dated, file, "hello", "--budget", "50%", tokens=3)
    document = {**read(file), "created": day.astimezone(UTC).isoformat().replace("+00:00", "Z")}
    file.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["replay", str(file)]) == 0
    assert "the answer is the recorded one" in capsys.readouterr().err
    file.write_text(json.dumps({**document, "created": "then"}))
    assert main(["replay", str(file)]) == 2
    assert "created is not a time" in capsys.readouterr().err


def test_another_prompt_cannot_be_replayed(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = read(plain)
    document["messages"][0]["content"] = "another"
    plain.write_text(json.dumps(document))
    assert main(["replay", str(plain)]) == 2
    assert "so the replies do not fit" in capsys.readouterr().err


def test_a_replay_without_its_small_model_names_no_flag_that_it_lacks(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(plain)
    document["models"]["small_spec"] = "qwen3-0.6b"
    plain.write_text(json.dumps(document))
    assert main(["replay", str(plain), "--cache-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("run `mlxroute pull qwen3-0.6b` while online\n")


def test_a_replay_of_an_answer_without_a_place_says_what_to_write(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(plain)
    folder = document["models"]["small_spec"]
    # An endpoint writes so.
    document["models"] |= {"small": "tiny", "small_spec": None}
    plain.write_text(json.dumps(document))
    assert main(["replay", str(plain)]) == 2
    err = capsys.readouterr().err
    assert "the answer does not say where its small model is (" in err
    assert f"as `small_spec` in `models` of {plain}, write the model's folder" in err
    document["models"]["small_spec"] = folder
    plain.write_text(json.dumps(document))
    assert main(["replay", str(plain)]) == 0


def test_a_replay_of_an_answer_without_a_place_loads_the_model_by_its_name(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(plain)
    document["models"]["small_spec"] = None
    plain.write_text(json.dumps(document))
    assert main(["replay", str(plain)]) == 0
    assert "the answer is the recorded one" in capsys.readouterr().err


def test_a_replay_without_memory_names_the_variable_as_it_has_no_flag(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlxroute.backend.memory.available_bytes", lambda: 1)
    assert main(["replay", str(plain)]) == 2
    assert "or skip this check (MLXROUTE_SKIP_MEMORY_CHECK)" in capsys.readouterr().err


def test_a_replay_says_that_it_does_not_use_a_head(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(plain), "--head", "any.safetensors"]) == 0
    assert "the head is not used: the answer was routed by entropy" in capsys.readouterr().err


def test_a_replay_warns_of_another_head(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = json.loads((tiny / "config.json").read_text())["hidden_size"] + SIGNAL_COUNT
    head, file = tmp_path / "head.safetensors", tmp_path / "answer.json"

    def write_head(bias: float) -> None:
        layers = {"0.weight": mx.zeros((1, size)), "0.bias": mx.array([bias])}
        mx.save_safetensors(str(head), layers)

    write_head(1.0)
    save_answer(tiny, file, "hello", "--head", str(head), "--threshold", "0", tokens=3)
    assert read(file)["router"]["head_sha256"] == hash_file(head)
    capsys.readouterr()
    assert main(["replay", str(file), "--head", str(head)]) == 0
    assert "warning" not in capsys.readouterr().err
    write_head(-1.0)
    assert main(["replay", str(file), "--head", str(head)]) == 0
    assert "warning: the head is not that of the answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"small": "{name}+0123abcd"}, "the answer is from {name}+0123abcd, and {name} decodes"),
        ({"small_files": "other"}, "the files of {name} may have changed since the answer"),
        # As an older version, or an endpoint, writes it.
        ({"small_files": None}, None),
        ({"small": "tiny"}, None),
    ],
)
def test_a_replay_warns_of_another_small_model(
    change: dict[str, str | None],
    warning: str | None,
    plain: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = read(plain)
    for key, value in change.items():
        document["models"][key] = value and value.format(name=tiny)
    plain.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["replay", str(plain)]) == 0
    err = capsys.readouterr().err
    assert "warning: " + warning.format(name=tiny) in err if warning else "warning" not in err


def test_a_threshold_and_a_budget_exclude_each_other(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(plain), "--threshold", "1", "--budget", "3%"]) == 2
    assert "--budget and --threshold exclude each other" in capsys.readouterr().err


def test_a_chat_changes_its_models_and_keeps_what_both_chose(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1, context=200)
    file = tmp_path / "chat.json"
    with (
        Loopback(honest(lambda request: Reply.of(legacy("a")), name="huge")) as first,
        Loopback(honest(lambda request: Reply.of(legacy("b")), name="vast")) as second,
    ):
        lines = ["one", f"/large {second.url}", "two", f"/small {other}", "/threshold", "three"]
        commands = "\n".join([*lines, "/why", f"/save {file}"])
        monkeypatch.setattr("sys.stdin", io.StringIO(commands))
        routed = ["--small", str(tiny), "--large", first.url, "--threshold", "-1"]
        assert main(["chat", *routed, "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["aa", "bb", "bb"]
    assert "threshold -1 nats" in captured.err
    assert captured.err.count('large  "b"') == 2
    answers = read(file)["answers"]
    assert [item["models"]["large"] for item in answers] == ["huge", "vast", "vast"]
    assert [item["models"]["small_spec"] for item in answers] == [str(tiny), str(tiny), str(other)]


def make_head(tiny: Path, folder: Path) -> Path:
    size = json.loads((tiny / "config.json").read_text())["hidden_size"] + SIGNAL_COUNT
    head = folder / "head.safetensors"
    mx.save_safetensors(str(head), {"0.weight": mx.zeros((1, size)), "0.bias": mx.zeros(1)})
    return head


def test_another_small_model_does_not_get_the_head_of_the_one_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    head = make_head(tiny, tmp_path)
    with Loopback(honest(lambda request: Reply.of(legacy("a")))) as server:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/threshold\n/small {other}\n/threshold\n"))
        routed = ["--small", str(tiny), "--large", server.url, "--head", str(head)]
        assert main(["chat", *routed]) == 0
    units = re.findall(r"threshold \S+ (nats|of head)", capsys.readouterr().err)
    assert units == ["of head", "nats"]


def test_another_small_model_does_not_get_a_threshold_of_the_head_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    head = make_head(tiny, tmp_path)
    with Loopback(honest(lambda request: Reply.of(legacy("a")))) as server:
        # The address again, which keeps the head and its threshold.
        lines = ["/threshold 0.5", f"/large {server.url}", "/threshold", f"/small {other}"]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        routed = ["--small", str(tiny), "--large", server.url, "--head", str(head)]
        assert main(["chat", *routed]) == 0
    err = capsys.readouterr().err
    assert "threshold 0.5 of head" in err
    note, described = err.splitlines()[-2:]
    assert note == "the threshold was on the scale of the earlier head, so it was dropped"
    assert described.endswith("for at most 7% of the tokens and 4 more, by entropy")


def test_a_threshold_of_a_head_is_dropped_with_it_before_there_is_a_large_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    head = str(make_head(tiny, tmp_path))
    with Loopback(honest(lambda request: Reply.of(legacy("a")))) as server:
        commands = f"/small {other}\n/large {server.url}\n"
        monkeypatch.setattr("sys.stdin", io.StringIO(commands))
        assert main(["chat", "--small", str(tiny), "--head", head, "--threshold", "0.5"]) == 0
    err = capsys.readouterr().err
    assert "the threshold was on the scale of the earlier head, so it was dropped" in err
    assert err.splitlines()[-1].endswith("for at most 7% of the tokens and 4 more, by entropy")


@pytest.mark.parametrize("rule", [[], ["--budget", "5%"], ["--threshold", "0.5"]])
def test_a_head_router_that_was_asked_for_stays_with_another_small_model(
    rule: list[str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    head = str(make_head(tiny, tmp_path))
    with Loopback(honest(lambda request: Reply.of(legacy("a")))) as server:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/small {other}\n"))
        routed = ["--small", str(tiny), "--large", server.url, "--router", "head", "--head", head]
        assert main(["chat", *routed, *rule]) == 2
    assert "there is no head for" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["/large ftp://x", "/small no/such/model"])
def test_models_that_cannot_be_used_are_an_error(
    command: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short_retry_pauses: None,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{command}\n"))
    assert main(["chat", "--small", str(tiny), "--large", "http://127.0.0.1:9/v1"]) == 2
    assert "error: " in capsys.readouterr().err


def test_offline_there_is_no_other_large_model(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/large http://127.0.0.1:9/v1\n"))
    assert main(["chat", "--small", str(tiny), "--offline"]) == 2
    assert "error: with --offline there is no large model" in capsys.readouterr().err
