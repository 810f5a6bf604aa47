"""The command line on a tiny model: streams, exit codes, one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from pathlib import Path

import psutil
import pytest

from mlxroute.cli import main
from mlxroute.cli.standard_streams import OutputUnusable
from mlxroute.large.http import circuit_breaker
from mlxroute.weights import hub_listing, package_index
from tests.support.command_process import CommandProcess, run_command
from tests.support.tiny import make_tiny_model

UNREACHABLE = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", context=200)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line an error prints, after whatever notices came before it."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "qwen2.5-codr-0.5b", "hi"], "did you mean qwen2.5-coder-0.5b"),
        (["--large", "htp:/nowhere", "hi"], "http://"),
        (["--large", "http://", "hi"], "http://"),
        (["--threshold", "abc", "hi"], "'abc' is not a number"),
        (["--threshold", "nan", "hi"], "nan"),
        (["--budget", "seven", "hi"], "write 7% or 0.07"),
        (["--budget", "101%", "hi"], "from 0% to 100%"),
        (["--budget", "7%", "--threshold", "1", "hi"], "exclude each other"),
        (["--router", "guess", "hi"], "'margin'"),
        (["--mode", "race", "hi"], "'wait'"),
        (["--prefetch", "-1", "hi"], "--prefetch must be from 0 to 64"),
        (["--call-ceiling", "0.5", "hi"], "--call-ceiling must be at least 1"),
        (["--events", "hi"], "--events needs --json"),
        (["--max-tokens", "0", "hi"], "--max-tokens"),
        (["--timeout", "inf", "hi"], "--timeout"),
        (["--seed", "-1", "hi"], "--seed"),
        (["--temperature", "-1", "hi"], "--temperature"),
        (["--key-env", "NOT_SET_ANYWHERE", "--large", UNREACHABLE, "hi"], "NOT_SET_ANYWHERE"),
        (["--small", "no/such/folder", "--offline", "hi"], "no/such/folder"),
        (["--nonsense", "hi"], "--nonsense"),
        ([""], "the prompt is empty"),
        (["  \n "], "the prompt is empty"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", *arguments]) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "--max-tokens", "1e3", "hi"], "--max-tokens must be an integer, not '1e3'"),
        (["ask", "--max-tokens", "", "hi"], "--max-tokens must be an integer, not ''"),
        (["ask", "--seed", "9" * 5000, "hi"], f"--seed must be an integer, not '{'9' * 39}…"),
        (["ask", "--temperature", "hot", "hi"], "--temperature must be a number, not 'hot'"),
        (["bench", "latency", "--ratio", "4", "--ratio", "x"], "--ratio must be a number, not 'x'"),
        (["host", "--port", "0"], "--port must be from 1 to 65535, not 0"),
        (["host", "--port", "70000"], "--port must be from 1 to 65535, not 70000"),
        (["bench", "kernels", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["adapt", "--rank", "0.0"], "--rank must be from 1 to 256, not 0.0"),
    ],
)
def test_a_flag_that_is_no_number_in_range_is_named_with_its_value(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert error_line(capsys) == f"error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pull", "--gguf", "qwen2.5-7b"],
            " has no GGUF file to fetch; leave out --gguf to fetch it for MLX",
        ),
        (["pull", "qwen2.5-7b", "--offline"], "while online (--offline)"),
    ],
)
def test_advice_names_only_flags_of_the_command(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--cache-dir", str(tmp_path)]) == 2
    line = error_line(capsys)
    assert line.endswith(message)
    assert "--engine" not in line


def test_an_error_contains_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "--small", "no/\x1b[2J\x9bfolder", "--offline", "hi"]) == 2
    assert "no/[2Jfolder" in error_line(capsys)


def test_an_unknown_config_key_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path(os.environ["MLXROUTE_CONFIG"]).write_text("thresold = 3\n")
    assert main(["ask", "hi"]) == 2
    assert "'thresold'" in (line := error_line(capsys))
    assert "'threshold'" in line


def test_a_prompt_beyond_the_context_is_refused_with_both_figures(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--small", str(tiny), "ab " * 300]) == 2
    assert "context holds 200" in error_line(capsys)


def test_too_little_memory_is_refused_with_both_figures(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", "--offline", "--small", str(tiny), "--max-tokens", "1", "hi"]
    # Imports everything first. Then the limit leaves less than a model needs.
    assert main(arguments) == 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + (500 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        code = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert code == 2
    assert "needs 0.6 GiB of memory" in capsys.readouterr().err


def test_without_a_server_the_small_model_answers_and_a_note_shows_how_to_get_one(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--small", str(tiny), "--max-tokens", "5", "hi"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert "--large URL" in captured.err
    assert "mlxroute host" in captured.err


def test_an_unreachable_server_leaves_an_unchecked_answer_and_exit_code_0(
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    short_retry_pauses: None,
) -> None:
    # However slow the machine, the pause after three failures lasts to the end.
    monkeypatch.setattr(circuit_breaker, "_FIRST_PAUSE_S", 300.0)
    arguments = ["--small", str(tiny), "--large", UNREACHABLE, "--threshold", "-inf"]
    assert main(["ask", *arguments, "--max-tokens", "5", "--json", "hi"]) == 0
    captured = capsys.readouterr()
    *tokens, summary = [json.loads(line) for line in captured.out.splitlines()]
    assert "127.0.0.1:9" in captured.err
    # The check at the start was the first of three failures, after which no call is made.
    assert summary["fallbacks"] == 2
    assert summary["threshold"] == "-inf"
    assert summary["unchecked"] == summary["tokens"] == len(tokens)
    assert all(not token["checked"] for token in tokens)
    assert "127.0.0.1:9" in tokens[0]["failure"]


def test_strict_turns_an_unreachable_server_into_exit_code_3(
    tiny: Path, capsys: pytest.CaptureFixture[str], short_retry_pauses: None
) -> None:
    assert main(["ask", "--small", str(tiny), "--large", UNREACHABLE, "--strict", "hi"]) == 3
    assert "127.0.0.1:9" in error_line(capsys)


@pytest.mark.parametrize("given", [[], ["--large", UNREACHABLE, "--offline"]])
def test_strict_needs_a_large_model(
    given: list[str], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--small", str(tiny), "--strict", *given, "hi"]) == 2
    assert "--strict needs a large model: give --large" in error_line(capsys)


def test_a_dash_is_replaced_by_standard_input(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ask", "--small", str(tiny), "--max-tokens", "6", "--json", "--offline"]

    def text(*prompt: str, piped: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        assert main([*arguments, *prompt]) == 0
        return str(json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_tokens"])

    alone = text("What is this?\n\nthe diff")
    assert text("What is this?", "-", piped="the diff") == alone
    assert text("-", piped="What is this?\n\nthe diff") == alone
    assert text(piped="What is this?\n\nthe diff") == alone
    assert text("What", "is", "this?", "-", piped="the diff") == alone


def test_a_closed_pipe_is_not_an_error(tiny: Path, tmp_path: Path) -> None:
    asking = ("ask", "--json", "--offline", "--small", str(tiny), "--max-tokens", "60", "hi")
    reader, writer = os.pipe()
    with open(reader) as output, open(tmp_path / "err", "w+b") as err:
        with CommandProcess(asking, stdout=writer, stderr=err) as process:
            os.close(writer)
            output.readline()
            output.close()
            assert process.wait() == 0
        err.seek(0)
        assert b"Traceback" not in err.read()


class InterruptedPipe(io.StringIO):
    """A pipe whose reader ends at the Ctrl-C that comes during the first write."""

    is_open = True

    def write(self, text: str) -> int:
        if self.is_open:
            self.is_open = False
            raise KeyboardInterrupt
        raise OutputUnusable(BrokenPipeError())


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_ctrl_c_that_also_ends_the_reader_of_a_pipe_is_code_130(
    form: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", InterruptedPipe())
    assert main(["ask", *form, "--offline", "--small", str(tiny), "--max-tokens", "9", "hi"]) == 130


def test_the_version_and_the_model_list_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlxroute ")
    assert main(["models", "--cache-dir", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "qwen2.5-coder-0.5b" in listed
    assert "smollm2-135m" in listed


@pytest.fixture
def reachable_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources of models seem to answer; `test_package_index.py` asks real ones."""
    for source in (hub_listing, package_index):
        monkeypatch.setattr(source, "find_problem", lambda: None)


def test_doctor_reports_every_check_and_its_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reachable_sources: None
) -> None:
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 0
    report = capsys.readouterr().out
    assert str(tmp_path) in report
    assert "GiB free" in report
    assert main(["doctor", "--cache-dir", str(tmp_path), "--large", UNREACHABLE]) == 2
    assert "FAIL large" in capsys.readouterr().out


def test_doctor_says_why_a_source_of_models_is_not_reachable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ImportError("Using SOCKS proxy, but the package is missing")

    monkeypatch.setattr(package_index, "find_problem", lambda: None)
    monkeypatch.setattr(hub_listing, "get_session", fail)
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert "- hub not reachable (Using SOCKS proxy, but the package is missing)" in report
    assert "ok package index reachable" in report


def test_a_bad_config_is_a_line_of_the_doctors_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reachable_sources: None
) -> None:
    Path(os.environ["MLXROUTE_CONFIG"]).write_text("thresold = 3\n")
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 2
    report = capsys.readouterr().out
    assert "FAIL config" in report
    assert "'threshold'" in report
    assert "GiB free" in report


def test_an_mlx_that_cannot_be_imported_is_a_line_of_the_doctors_report(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reachable_sources: None,
) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 2
    report = capsys.readouterr().out
    assert "FAIL device" in report
    assert "MLX cannot be used: import of mlx.core" in report
    assert "GiB free" in report
    assert str(tmp_path) in report


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("MLXROUTE_NEVER_SEND_FILE", "config"),
        ("MLXROUTE_CONFIG", "config"),
        ("MLXROUTE_CACHE_DIR", "cache"),
    ],
)
def test_a_home_folder_of_nobody_is_a_line_of_the_doctors_report(
    variable: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reachable_sources: None,
) -> None:
    monkeypatch.setenv(variable, "~nosuchuser/x")
    assert main(["doctor"]) == 2
    report = capsys.readouterr().out
    assert f"FAIL {name}" in report
    assert "nosuchuser" in report
    assert "GiB free" in report


def test_doctor_makes_no_request_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXROUTE_OFFLINE", "1")
    assert main(["doctor", "--cache-dir", str(tmp_path), "--large", UNREACHABLE]) == 0
    assert "not checked: offline" in capsys.readouterr().out


def test_doctor_connects_to_nothing_if_the_settings_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    monkeypatch.setenv("MLXROUTE_OFFLINE", "1")
    monkeypatch.setenv("MLXROUTE_SEED", "x")
    assert main(["doctor", "--cache-dir", str(tmp_path), "--large", UNREACHABLE]) == 2
    report = capsys.readouterr().out
    assert "FAIL config" in report
    assert "not checked: the settings cannot be read" in report
    assert "FAIL large" not in report


@pytest.mark.parametrize("locale", ["C", "a UTF-8 one"])
def test_a_prompt_that_is_not_utf8_is_answered(tiny: Path, locale: str) -> None:
    arguments = ("--offline", "--small", str(tiny), "--max-tokens", "3")
    result = run_command(
        *("ask", *arguments, "-", "--system", os.fsdecode(b"h\xff")),
        stdin=b"h\xffi",
        environ={"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        # Only a new interpreter follows the locale; the other has UTF-8, and errors are strict.
        fresh=locale == "C",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_cannot_be_written_is_one_clear_line(tiny: Path) -> None:
    asking = ("ask", "--offline", "--small", str(tiny), "--max-tokens", "3", "hi")
    with open("/dev/full", "wb") as full:
        result = run_command(*asking, stdout=full)
    assert result.returncode == 2
    assert b"Traceback" not in result.stderr
    assert b"error: " in result.stderr


def test_setting_a_threshold_without_a_large_model_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/threshold 3\n"))
    assert main(["chat", "--offline", "--small", str(tiny)]) == 2
    assert "no large model" in error_line(capsys)


def test_the_users_entries_are_in_the_catalogue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(os.environ["MLXROUTE_CONFIG"]).parent / "models"
    own.mkdir()
    (own / "mine.toml").write_text(
        "[[models]]\n"
        'name = "my-model"\nlicense = "MIT"\nparameters = 1000\n'
        'hub_id = "me/my-model"\nhub_bytes = 4000\n'
    )
    assert main(["models", "--cache-dir", str(tmp_path)]) == 0
    assert "my-model" in capsys.readouterr().out
