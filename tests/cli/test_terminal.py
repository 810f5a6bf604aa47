"""Commands on a pseudo-terminal: signals, typing during an answer, and output elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.command_process import run_command
from tests.support.gguf_files import TinyModel, write_gguf
from tests.support.llama_cpp import has_llama_cpp
from tests.support.pseudo_terminal import DEADLINE_S, PseudoTerminal
from tests.support.tiny import make_tiny_model

CTRL_C, CTRL_D, CTRL_Z = "\x03", "\x04", "\x1a"
# The line before it may be wrapped anywhere.
PROMPT = "commands."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny", context=100_000)


def command(name: str, tiny: Path, *arguments: str, max_tokens: int = 90_000) -> list[str]:
    """Return the arguments of a command whose answer lasts longer than any test."""
    options = ["--offline", "--small", str(tiny), "--max-tokens", str(max_tokens)]
    return [name, *options, *arguments]


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """Yield the end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def wait_for_answer(terminal: PseudoTerminal, name: str) -> int:
    """Wait until an answer is being written; return the length of the output."""
    if name == "chat":
        terminal.wait_for(PROMPT)
        terminal.type("hello\r")
    end = terminal.wait_for("writing")
    terminal.wait_until(lambda: not terminal.echoes, "hidden typing")
    return end


@pytest.mark.parametrize("name", ["ask", "chat"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)]
)
def test_a_signal_in_mid_answer_leaves_the_terminal_as_it_was(
    tiny: Path, name: str, number: signal.Signals, code: int
) -> None:
    question = ["hi"] if name == "ask" else []
    with PseudoTerminal(command(name, tiny, *question)) as terminal:
        wait_for_answer(terminal, name)
        terminal.send(number)
        assert terminal.wait() == code
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")
        assert "Traceback" not in terminal.output


def test_a_signal_at_the_prompt_leaves_the_terminal_as_it_was(tiny: Path) -> None:
    with PseudoTerminal(command("chat", tiny)) as terminal:
        terminal.wait_for(PROMPT)
        terminal.wait_until(lambda: not terminal.echoes, "line editor")
        terminal.send(signal.SIGTERM)
        assert terminal.wait() == 143
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")
        assert "Traceback" not in terminal.output


@pytest.mark.parametrize("name", ["ask", "chat"])
def test_ctrl_z_shows_the_cursor_and_the_answer_goes_on_afterwards(tiny: Path, name: str) -> None:
    question = ["hi"] if name == "ask" else []
    with PseudoTerminal(command(name, tiny, *question)) as terminal:
        wait_for_answer(terminal, name)
        terminal.type(CTRL_Z)
        terminal.wait_stopped()
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")
        stopped_at = len(terminal.output)
        terminal.send(signal.SIGCONT)
        terminal.wait_for("writing", after=stopped_at)
        terminal.wait_until(lambda: not terminal.echoes, "hidden typing")
        terminal.type(CTRL_C)
        if name == "chat":
            terminal.wait_for("(stopped)")
            terminal.type(CTRL_D)
        assert terminal.wait() == (130 if name == "ask" else 0)
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")


def test_a_signal_ends_a_server_that_was_started(tiny: Path, tmp_path: Path) -> None:
    # llama.cpp starts much faster than MLX's server.
    model = write_gguf(tmp_path / "tiny.gguf", TinyModel()) if has_llama_cpp() else tiny
    with PseudoTerminal(["host", str(model)]) as terminal:
        terminal.wait_for("serving ")
        children = psutil.Process(terminal.pid).children(recursive=True)
        assert children
        terminal.send(signal.SIGTERM)
        assert terminal.wait() == 143
        _, alive = psutil.wait_procs(children, timeout=5)
        assert alive == []


def test_an_error_while_objects_are_deleted_is_not_printed_after_a_signal() -> None:
    script = (
        "import os, signal\n"
        "from mlxroute.cli.process_signals import ProcessSignals\n"
        "class Loop:\n"
        "    def __del__(self):\n"
        "        raise ValueError\n"
        "def edit():\n"
        "    loop = Loop()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "with ProcessSignals() as signals:\n"
        "    edit()\n"
        "os._exit(signals.exit_code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=DEADLINE_S)
    assert (result.returncode, result.stderr) == (143, b"")


def test_a_second_ctrl_c_leaves_no_traceback(tiny: Path) -> None:
    with PseudoTerminal(command("ask", tiny, "hi")) as terminal:
        wait_for_answer(terminal, "ask")
        terminal.type(CTRL_C)
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")
        assert "Traceback" not in terminal.output


def test_ctrl_c_while_a_model_is_loaded_leaves_the_terminal_as_it_was(tiny: Path) -> None:
    with PseudoTerminal(command("ask", tiny, "hi"), fresh=True) as terminal:
        terminal.wait_for("the small model answers alone")
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")
        assert "Traceback" not in terminal.output


def test_ctrl_c_while_the_command_line_is_imported_leaves_no_traceback() -> None:
    script = (
        "import os, signal, sys\n"
        "from mlxroute.__main__ import run\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "run()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=DEADLINE_S)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    "patch",
    [
        "TerminalModes.restore = lambda self: interrupt()",
        "signal.signal = lambda number, handler: (\n"
        "    number is signal.SIGTERM and handler is signal.SIG_DFL and interrupt(),\n"
        "    set_handler(number, handler)\n"
        ")[1]",
    ],
)
def test_ctrl_c_after_the_command_leaves_no_traceback(patch: str) -> None:
    script = (
        "import os, signal, sys\n"
        "from mlxroute.__main__ import run\n"
        "from mlxroute.terminal_modes import TerminalModes\n"
        "set_handler = signal.signal\n"
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        f"{patch}\n"
        "sys.argv[1:] = ['--version']\n"
        "run()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=DEADLINE_S)
    assert (result.returncode, result.stderr) == (130, b"")


def test_what_is_typed_during_an_answer_waits_for_the_next_prompt(tiny: Path) -> None:
    with PseudoTerminal(command("chat", tiny, max_tokens=200)) as terminal:
        start = wait_for_answer(terminal, "chat")
        terminal.type("/stats\r")
        end = terminal.wait_for("200 tokens, 0 escalated", after=start)
        assert "/stats" not in terminal.output[start:end]
        terminal.wait_for("1 answer, 200 tokens", after=end)
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")


def test_text_pasted_during_an_answer_is_one_message(tmp_path: Path) -> None:
    tiny = make_tiny_model(tmp_path / "tiny", context=5_000)
    with PseudoTerminal(command("chat", tiny, max_tokens=300)) as terminal:
        start = wait_for_answer(terminal, "chat")
        terminal.wait_for("\x1b[?2004h", after=terminal.output.find("hello"))
        # Several times what a terminal keeps for a command that does not read.
        lines = "".join(f"line {number} of many\r" for number in range(1_000))
        terminal.type(f"\x1b[200~{lines}\x1b[201~\r")
        end = terminal.wait_for("300 tokens, 0 escalated", after=start)
        assert "line 1 of many" not in terminal.output[start:end]
        # The whole text is one prompt.
        refused = terminal.wait_for("the small model's context holds", after=end)
        # A key that comes before the next prompt would not be for its line.
        prompt = terminal.wait_for("\x1b[?2004h", after=refused)
        terminal.type(CTRL_C)
        terminal.wait_for("\x1b[?2004h", after=prompt)
        terminal.type(CTRL_D)
        terminal.wait()
        terminal.wait_until(lambda: terminal.is_as_before, "restored terminal")
        assert terminal.output.rfind("\x1b[?2004l") > terminal.output.rfind("\x1b[?2004h")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
def test_only_a_terminal_gets_the_live_view(tiny: Path, variable: str) -> None:
    environ = {variable: "1", "TTY_INTERACTIVE": "1", "TERM": "xterm"}
    result = run_command(*command("ask", tiny, "hi", max_tokens=20), environ=environ)
    assert result.returncode == 0
    assert b"\x1b" not in result.stdout
    assert b"tok/s \xc2\xb7" not in result.stderr
    for control in (b"\x1b[?", b"\x1b[2K", b"\x1b[1A", b"\r"):
        assert control not in result.stderr


def test_an_answer_goes_to_a_file_as_text_and_its_figures_to_the_terminal(
    tiny: Path, tmp_path: Path
) -> None:
    with (tmp_path / "answer.txt").open("w+b") as file:
        asking = command("ask", tiny, "hi", max_tokens=20)
        with PseudoTerminal(asking, stdout=file) as terminal:
            terminal.wait_for("20 tokens")
            assert terminal.wait() == 0
        file.seek(0)
        assert b"\x1b" not in file.read()


def test_an_answer_is_shown_live_with_its_figures_in_a_file(tiny: Path, tmp_path: Path) -> None:
    with (tmp_path / "figures.txt").open("w+b") as file:
        asking = command("ask", tiny, "hi", max_tokens=20)
        with PseudoTerminal(asking, stderr=file) as terminal:
            terminal.wait_for("writing")
            assert terminal.wait() == 0
        file.seek(0)
        figures = file.read()
        assert b"20 tokens" in figures
        assert b"\x1b" not in figures


def test_a_dumb_terminal_gets_no_control_codes(tiny: Path) -> None:
    asking = command("ask", tiny, "hi", max_tokens=20)
    with PseudoTerminal(asking, environ={"TERM": "dumb"}) as terminal:
        terminal.wait_for("20 tokens")
        assert terminal.wait() == 0
        assert "\x1b" not in terminal.output


def test_a_chat_on_a_dumb_terminal_reads_lines_and_writes_no_control_codes(tiny: Path) -> None:
    chatting = command("chat", tiny, max_tokens=20)
    with PseudoTerminal(chatting, environ={"TERM": "dumb"}) as terminal:
        terminal.wait_for("> ", after=terminal.wait_for(PROMPT))
        terminal.type("hi\n")
        terminal.wait_for("> ", after=terminal.wait_for("20 tokens"))
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert "\x1b" not in terminal.output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_any_command_without_an_error(
    arguments: list[str], unbuffered: str
) -> None:
    with closed_pipe() as writer:
        result = run_command(*arguments, stdout=writer, environ={"PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"]])
def test_a_full_output_is_one_clear_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = run_command(*arguments, stdout=full)
    assert result.returncode == 2
    assert result.stderr == b"error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("stderr", ["closed", "full", "closed pipe"])
def test_an_answer_does_not_need_stderr(tiny: Path, stderr: str) -> None:
    asking = command("ask", tiny, "hi", "--json", max_tokens=20)
    if stderr == "closed":
        fresh = [sys.executable, "-m", "mlxroute", *asking]
        script = ["sh", "-c", '"$@" 2>&-', "sh", *fresh]
        result = subprocess.run(script, capture_output=True, timeout=DEADLINE_S)
    elif stderr == "closed pipe":
        with closed_pipe() as writer:
            result = run_command(*asking, stderr=writer)
    elif Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            result = run_command(*asking, stderr=full)
    else:
        pytest.skip("a device of Linux")
    assert result.returncode == 0
    assert b'"type": "summary"' in result.stdout
