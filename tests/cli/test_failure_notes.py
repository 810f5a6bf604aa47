"""A server that fails in mid-session: every answer says so, with the reason."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mlxroute.cli import main
from mlxroute.cli.error_advice import error_message
from mlxroute.cli.failure_notes import FailureNotes, failure_note
from mlxroute.cli.terminal import make_consoles, make_table, show_answer
from mlxroute.config import Settings, load_settings
from mlxroute.engine import generate
from mlxroute.errors import LargeTimeout, UsageError
from mlxroute.routers import EntropyRouter
from mlxroute.types import CallFailure
from tests.support.connected_clients import legacy
from tests.support.family_servers import FamilyServer
from tests.support.hosted_servers import PROVIDERS, HostedServer
from tests.support.known_answers import write_known
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import honest
from tests.support.scripted_models import ScriptedLarge, ScriptedSmall
from tests.support.tiny import make_tiny_model

FAULTS = {
    "status 401": Reply.of({"error": "key revoked"}, status=401),
    "status 404": Reply.of({"error": {"message": "model 'm' not found"}}, status=404),
    "status 413": Reply(b"<html>too large</html>", status=413),
    "invalid reply": Reply(b"<html>login</html>"),
    "unreachable": Reply(raw=b""),
}


@pytest.mark.parametrize(
    ("parameter", "flag", "variable"),
    [
        ("timeout_s", "--timeout", "MLXROUTE_TIMEOUT"),
        ("model", "--large-model", "MLXROUTE_LARGE_MODEL"),
        ("ca_bundle", "--ca-bundle", "MLXROUTE_CA_BUNDLE"),
    ],
)
def test_advice_names_the_variable_where_the_command_has_no_such_flag(
    parameter: str, flag: str, variable: str
) -> None:
    error = UsageError("too short", parameter=parameter)
    assert error_message(error) == error_message(error, flags={flag}) == f"too short ({flag})"
    assert error_message(error, flags={"--small"}) == f"too short ({variable})"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", context=200)


def failing_after(count: int, fault: Reply) -> Callable[[Request], Reply]:
    """Return a server that is honest in a negotiation and fails from the call `count` on."""
    calls = [0]

    def play(request: Request) -> Reply:
        calls[0] += 1
        return Reply.of(legacy("a")) if calls[0] <= count else fault

    return honest(play)


def arguments(tiny: Path, server: Loopback, *more: str) -> list[str]:
    always = ["--small", str(tiny), "--large", server.url, "--threshold", "-inf"]
    return [*always, "--mode", "wait", "--max-tokens", "6", "--timeout", "5", *more]


def notes_in(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("kind", FAULTS)
def test_the_first_failure_in_mid_session_is_one_line_with_its_reason(
    kind: str, tiny: Path, capsys: pytest.CaptureFixture[str], short_retry_pauses: None
) -> None:
    with Loopback(failing_after(2, FAULTS[kind])) as server:
        assert main(["ask", *arguments(tiny, server, "--json"), "hello"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    first = summary["failures"][0]
    assert first["kind"] == kind
    assert notes_in(captured.err)[0].startswith(f"warning: {first['reason']}")
    # Then the circuit breaker pauses the calls, which is said once too.
    assert [failure["kind"] for failure in summary["failures"]][1:] in ([], ["paused"])
    assert len(notes_in(captured.err)) == len(summary["failures"])
    assert sum(failure["count"] for failure in summary["failures"]) == summary["unchecked"] == 4


def test_a_server_that_cannot_be_reached_is_said_once(
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    short_retry_pauses: None,
) -> None:
    short = ["--small", str(tiny), "--large", "http://127.0.0.1:9/v1", "--threshold", "-inf"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/large http://127.0.0.1:9/v1\nagain\n"))
    assert main(["chat", *short, "--max-tokens", "1"]) == 0
    err = capsys.readouterr().err
    notes = notes_in(err)
    assert len(notes) == 2
    assert all(note.endswith("the small model writes alone") for note in notes)
    assert err.count("1 failed call (unreachable)") == 2


def test_the_summary_counts_failures_by_kind(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Loopback(failing_after(2, FAULTS["status 401"])) as server:
        assert main(["ask", *arguments(tiny, server), "hello"]) == 0
    err = capsys.readouterr().err
    assert "1 failed call (status 401), 3 calls not made (paused)" in err


def test_each_answer_of_a_chat_says_it_and_stats_has_the_reasons(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n/stats\n"))
    with Loopback(failing_after(0, FAULTS["status 404"])) as server:
        assert main(["chat", *arguments(tiny, server)]) == 0
    err = capsys.readouterr().err
    first, *others = notes_in(err)
    assert first.endswith("answered 404: model 'm' not found")
    assert len(others) == 2
    assert all("are paused for another" in line for line in others)
    assert (
        f"3 positions unchecked, status 404: {server.url} answered 404: model 'm' not found" in err
    )
    assert "9 positions unchecked, paused: calls to" in err


def test_a_note_waits_while_the_answer_is_drawn_on_the_same_terminal() -> None:
    failure = CallFailure("timeout", "no full reply", 1, True, "timeout_s")
    assert failure_note(failure) == "no full reply (--timeout)"
    for out_is_terminal, err_is_terminal in ((True, True), (True, False), (False, True)):
        out = Console(file=io.StringIO(), force_terminal=out_is_terminal)
        err = Console(file=io.StringIO(), force_terminal=err_is_terminal, color_system=None)
        notes = FailureNotes(out, err)
        notes(failure)
        assert isinstance(err.file, io.StringIO)
        is_held = out_is_terminal and err_is_terminal
        assert bool(err.file.getvalue()) is not is_held
        notes.flush()
        assert err.file.getvalue() == "warning: no full reply (--timeout)\n"


def test_a_failed_comparison_of_the_vocabularies_is_said(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxroute.errors import LargeTimeout
    from mlxroute.large import LargeModel

    def fail(self: LargeModel, vocabulary: object) -> bool:
        raise LargeTimeout("no full reply", parameter="timeout_s")

    monkeypatch.setattr(LargeModel, "pair_vocabulary", fail)
    with Loopback(failing_after(99, Reply())) as server:
        assert main(["ask", *arguments(tiny, server), "hello"]) == 0
    assert notes_in(capsys.readouterr().err) == [
        "warning: no full reply (--timeout); the first call tries again"
    ]


# What is known of the two vocabularies


@pytest.mark.parametrize(
    ("is_same", "detail", "line"),
    [
        (True, "", "the vocabularies of huge and tiny are the same"),
        (
            False,
            "token 3 is 'a' and 'b'",
            "the vocabularies of huge and tiny differ (for example, token 3 is 'a' and 'b');"
            " its chat template is not known here, so it gets the small model's",
        ),
        (
            None,
            "the server names no ids",
            "the vocabularies of huge and tiny could not be compared (the server names no ids), so"
            " tokens pass as text; its chat template is not known here, so it gets the small"
            " model's",
        ),
    ],
)
def test_a_line_says_what_is_known_of_the_vocabularies(
    is_same: bool | None, detail: str, line: str
) -> None:
    from mlxroute.cli.vocabulary_note import describe_vocabularies
    from mlxroute.large.vocabulary.vocabulary_comparison import VocabularyComparison

    comparison = VocabularyComparison(is_same, detail)
    assert describe_vocabularies("huge", "tiny", comparison, knows_template=bool(is_same)) == line


def test_a_server_that_names_no_ids_is_not_said_to_have_another_vocabulary(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Loopback(failing_after(99, Reply())) as server:
        assert main(["ask", *arguments(tiny, server), "hello"]) == 0
    err = capsys.readouterr().err
    assert "could not be compared (the server names no ids)" in err
    assert "differ" not in err


@pytest.mark.parametrize("only_chats", [True, False])
def test_a_line_says_that_tokens_asked_by_example_are_approximate(
    tiny: Path, capsys: pytest.CaptureFixture[str], *, only_chats: bool
) -> None:
    chat = HostedServer(PROVIDERS["OpenAI GPT-4.1"], write_known)
    with Loopback(chat if only_chats else failing_after(99, Reply())) as server:
        assert main(["ask", *arguments(tiny, server), "hello"]) == 0
    line = "m only chats, so it is asked by example: its tokens are not those of its own answer"
    assert capsys.readouterr().err.splitlines().count(line) == only_chats


# Secrets of the address and the environment


def warnings_of(
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    settings: Settings | None = None,
    /,
    **environ: str,
) -> list[str]:
    from mlxroute.cli.large_setup import make_large
    from mlxroute.ledger import Ledger

    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    err = Console(file=io.StringIO(), width=500)
    with make_large(settings or Settings(), address, Ledger(), err):
        pass
    assert isinstance(err.file, io.StringIO)
    assert "s3cret" not in err.file.getvalue()
    return err.file.getvalue().splitlines()


def test_a_name_that_leads_to_no_readable_folder_finds_no_tokenizer() -> None:
    from mlxroute.cli.large_setup import make_tokenizer_finder

    # The system refuses to look there, as it does in a folder that the user may not enter.
    find = make_tokenizer_finder(Settings(), "http://127.0.0.1:8000/v1")
    assert find("/" + 300 * "x") is None


def test_a_secret_over_plain_http_to_another_machine_has_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (line,) = warnings_of(monkeypatch, "http://box.example:8000", OPENAI_API_KEY="s3cret")
    assert line.startswith("warning: the key goes to http://box.example:8000/v1 unencrypted")
    (line,) = warnings_of(monkeypatch, "http://me:s3cret@box.example:8000")
    assert line.startswith("warning: the password goes to http://box.example:8000/v1 unencrypted")
    for address in ("http://127.0.0.1:8000", "http://localhost:1", "https://box.example"):
        assert warnings_of(monkeypatch, address, OPENAI_API_KEY="s3cret") == []
    assert warnings_of(monkeypatch, "http://box.example:8000") == []


def test_a_key_that_goes_to_another_server_than_its_own_has_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = {"OPENAI_API_KEY": "s3cret", "OPENAI_BASE_URL": "https://api.example/v1"}
    (line,) = warnings_of(monkeypatch, "https://box.example/v1", **own)
    assert line.startswith("warning: the key in OPENAI_API_KEY goes to https://box.example/v1, but")
    assert warnings_of(monkeypatch, "https://api.example/other", **own) == []
    settings = Settings(key_env="MY_KEY", key_server="https://corp.example/v1")
    (line,) = warnings_of(monkeypatch, "https://box.example/v1", settings, MY_KEY="s3cret")
    assert line.startswith(
        "warning: the key in MY_KEY goes to https://box.example/v1, but the settings name another"
    )
    assert warnings_of(monkeypatch, "https://corp.example/x", settings, MY_KEY="s3cret") == []
    # OPENAI_API_KEY is of no server that the settings name.
    unnamed = Settings(key_server="http://127.0.0.1:8081/v1")
    assert warnings_of(monkeypatch, "https://x.example", unnamed, OPENAI_API_KEY="s3cret") == []


def test_probe_does_not_ask_its_server_for_the_model_of_another_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXROUTE_LARGE", "https://corp.example/v1")
    monkeypatch.setenv("MLXROUTE_LARGE_MODEL", "huge")
    with Loopback(FamilyServer("llama-server", models=("m",))) as server:
        assert main(["probe", server.url]) == 0
    assert "huge" not in capsys.readouterr().err
    assert not any(b"huge" in request.body for request in server.requests)


def test_the_address_wins_over_a_key_that_settings_name_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(key_env="MY_KEY")
    (line,) = warnings_of(monkeypatch, "https://me:s3cret@box.example", settings, MY_KEY="s3cret")
    assert line == (
        "warning: the user and password of the address are sent, not the key that the settings name"
    )


@pytest.mark.parametrize(("mode", "is_open"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_config_file_that_shows_others_a_password_has_a_warning(
    mode: int, is_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, address = tmp_path / "config.toml", "https://me:s3cret@box.example/v1"
    file.write_text(f'large = "{address}"\n')
    file.chmod(mode)
    monkeypatch.setenv("MLXROUTE_CONFIG", str(file))
    of_file = load_settings({}, environ={}, path=file)
    line = f"warning: other users can open {file}, which has a password; run `chmod 600 {file}`"
    assert warnings_of(monkeypatch, address, of_file) == [line] * is_open
    of_flag = load_settings({"large": address}, environ={}, path=file)
    assert warnings_of(monkeypatch, address, of_flag) == []


def test_a_password_on_the_command_line_has_a_warning_and_wins_over_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-real")
    with Loopback(failing_after(0, Reply())) as server:
        typed = server.url.replace("//", "//me:s3cret@")
        monkeypatch.setattr("sys.argv", ["mlxroute", "probe", typed])
        assert main(["probe", typed]) == 0
    assert {request.headers["authorization"] for request in server.requests} == {
        "Basic bWU6czNjcmV0"
    }
    captured = capsys.readouterr()
    assert "visible to other users of this machine" in captured.err.splitlines()[0]
    stored = (Path(os.environ["MLXROUTE_CACHE_DIR"]) / "endpoints.json").read_text()
    assert "s3cret" not in captured.out + captured.err + stored


@pytest.mark.parametrize("command", ["ask", "probe"])
def test_a_model_that_the_server_does_not_list_has_a_note(
    command: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = FamilyServer("llama-server", models=("nosuch",))

    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": "m"}]})
        return answers(request)

    with Loopback(answer) as server:
        large = ["--large-model", "nosuch", *(["--large"] if command == "ask" else []), server.url]
        rest = ["--small", str(tiny), "--budget", "0%", "hi"] if command == "ask" else []
        assert main([command, *large, *rest]) == 0
    note = f"{server.url} does not list the model nosuch; it lists m"
    assert note in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("command", "status"),
    [(["probe"], 3), (["doctor", "--large"], 2), (["serve", "--strict", "--large"], 3)],
)
def test_a_model_that_the_server_does_not_have_has_the_note_too(
    command: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with Loopback(FamilyServer("vllm")) as server:
        assert main([*command, server.url, "--large-model", "nosuch"]) == status
    captured = capsys.readouterr()
    note = f"{server.url} does not list the model nosuch; it lists m"
    assert note in captured.err.splitlines()
    assert "as in /v1" not in captured.out + captured.err


@pytest.mark.parametrize(("position", "text"), [(0, ""), (2, "ab\n")])
def test_a_strict_answer_that_fails_ends_the_line_that_it_began(
    position: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = generate(
        ScriptedSmall(b"abc", entropies={position: 2.0}),
        ScriptedLarge([LargeTimeout("no reply")]),
        "hi",
        router=EntropyRouter(1.0),
        mode="wait",
        strict=True,
    )
    out, err = make_consoles()
    with pytest.raises(LargeTimeout):
        show_answer(answer, heat=False, threshold=1.0, out=out, err=err)
    assert capsys.readouterr().out == text


def test_addresses_and_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = make_consoles()
    texts = ["http://[fd00::1]:8787/v1", "http://[2001:db8:100::5]:8000/v1", "/models:100:q4/[b]"]
    for text in texts:
        out.print(text, soft_wrap=True)
    table = make_table("path")
    table.add_row(texts[2])
    out.print(table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == texts
    assert texts[2] in lines[3:]
