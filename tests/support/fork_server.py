"""A process that imports the command line once and forks each command from itself.

Run by `tests.support.command_process`. A new interpreter spends over a second of CPU time on the
imports of one command. Each command gets a parent that does what a shell does: it has a session,
reports the command's process id, its stops and its end, and waits to be ended itself.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import signal
import socket
import sys
import termios
import threading
from pathlib import Path
from typing import Any

# A fork that imported the libraries of macOS may crash, so there a new interpreter follows.
_FORKS = sys.platform == "linux"
_DESCRIPTORS = 6
_EXIT_UNFLUSHED = 120
_MODULES = (
    *("mlxroute.__main__", "mlxroute.answers.document_file", "mlxroute.answers.recorded_answer"),
    *("mlxroute.answers.reply_recorder", "mlxroute.answers.router_record"),
    *("mlxroute.backend.load", "mlxroute.cli.app", "mlxroute.cli.setting_options"),
    *("mlxroute.cli.commands.ask", "mlxroute.cli.commands.chat", "mlxroute.cli.commands.demo"),
    *("mlxroute.cli.commands.doctor", "mlxroute.cli.commands.serve"),
    *("mlxroute.cli.chat_session", "mlxroute.cli.failure_notes", "mlxroute.cli.json_lines"),
    *("mlxroute.cli.line_input", "mlxroute.cli.progress", "mlxroute.cli.session"),
    *("mlxroute.cli.terminal", "mlxroute.engine", "mlxroute.large", "mlxroute.small"),
    *("mlxroute.serving", "mlxroute.view.live_area", "importlib.metadata"),
    *("pydantic.plugin._loader", "rich.live", "rich.progress", "typer._adapters", "tokenizers"),
)
# Where MLX computes on the CPU, its import starts no thread and opens no device.
_MLX_MODULES = ("mlx_lm.models.llama", "mlx_lm.utils", "mlxroute.small.decoder")


def main() -> None:
    """Fork a process for each request on the socket of the first argument, until it is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    if _FORKS:
        _import_modules()
    gc.freeze()
    while True:
        byte, fds, _, _ = socket.recv_fds(control, 1, _DESCRIPTORS)
        if not byte:
            break
        if not os.fork():
            control.close()
            _watch_command(*fds)
            return
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _import_modules() -> None:
    from mlxroute.backend import blas

    for name in _MODULES:
        importlib.import_module(name)
    if blas.interpose(Path(os.environ["MLXROUTE_CACHE_DIR"])):
        for name in _MLX_MODULES:
            importlib.import_module(name)


def _watch_command(
    content: int, stdin: int, stdout: int, stderr: int, report: int, hold: int
) -> None:
    """Fork the command, report what becomes of it, and wait to be ended.

    macOS closes a terminal for everybody when the first process of its session ends.
    """
    with open(content, "rb") as file:
        request = json.load(file)
    os.setsid()
    for number, fd in enumerate((stdin, stdout, stderr)):
        os.dup2(fd, number)
        os.close(fd)
    if request["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    pid = os.fork()
    if not pid:
        os.close(report)
        os.close(hold)
        _run_command(request)
        return
    if not request["terminal"]:
        # Their reader waits for the end of the command only.
        for number in range(3):
            os.close(number)
    os.write(report, b"%d\n" % pid)
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        os.write(report, b"stopped\n")
    os.write(report, b"ended %d\n" % os.waitstatus_to_exitcode(status))
    os.read(hold, 1)
    os._exit(0)


def _run_command(request: dict[str, Any]) -> None:
    """Do in this process what a new interpreter would do for `python -m mlxroute`."""
    if request["terminal"]:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
    # A background job does not have them.
    for number in (signal.SIGTTOU, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    if request["fresh"] or not _FORKS:
        command = [sys.executable, "-m", "mlxroute", *request["arguments"]]
        os.execve(sys.executable, command, request["environ"])
    os.environ.clear()
    os.environ.update(request["environ"])
    _open_streams()
    sys.argv = ["mlxroute", *request["arguments"]]
    from mlxroute.__main__ import run

    try:
        run()
    except SystemExit as end:
        # To delete every object, as an interpreter does, would copy all memory of this fork.
        _end(int(end.code or 0))


def _end(code: int) -> None:
    """End the process after what an interpreter does before it deletes its objects."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = _EXIT_UNFLUSHED
    os._exit(code)


def _open_streams() -> None:
    """Give `sys` the streams of the new descriptors, as an interpreter does at its start."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _writer(1, errors="strict")
    sys.stderr = _writer(2, errors="backslashreplace")
    sys.stderr.reconfigure(line_buffering=True)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))


def _writer(number: int, *, errors: str) -> io.TextIOWrapper:
    if os.environ.get("PYTHONUNBUFFERED"):
        raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115
        return io.TextIOWrapper(raw, errors=errors, write_through=True)
    return open(number, "w", errors=errors, closefd=False)


if __name__ == "__main__":
    main()
