"""Launch of a large model on this machine: `mlx_lm.server` as a child process on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import psutil

from mlxroute.backend.load import check_memory, memory_needed
from mlxroute.closeable import Closeable
from mlxroute.errors import LargeError, LaunchError
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.transport import Transport
from mlxroute.safe_text import printable_line
from mlxroute.types import Progress, no_progress

_POLL_S: Final = 0.1
_STOP_GRACE_S: Final = 5.0
# How long after a broken connection the end of the child may become visible.
_EXIT_WAIT_S: Final = 1.0
_LOADING: Final = "loading the large model"
_LOG_TAIL_BYTES: Final = 16384
_FIRST_REQUEST: Final = b'{"prompt": "1, 2, 3,", "max_tokens": 1, "temperature": 0}'


class LocalServer(Closeable):
    """A running `mlx_lm.server`, which ends at `close` or with this process.

    Args:
        process: The child process.
        port: Port that it listens on.
        log_path: File with its output.
        model_bytes: Memory that the loaded model takes.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], *, port: int, log_path: Path, model_bytes: int
    ) -> None:
        self._process = process
        self._port = port
        self._model_bytes = model_bytes
        self.log_path = log_path

    @classmethod
    def launch(
        cls, model_path: Path, *, cache_dir: Path, log_path: Path, port: int | None = None
    ) -> LocalServer:
        """Start the child and return at once; call `wait_until_ready` before use.

        Args:
            model_path: Directory of the model to serve.
            cache_dir: Cache folder, which contains the faster BLAS.
            log_path: File for the child's output, which is overwritten.
            port: Port to listen on. None (default) for a free one.

        Raises:
            NotEnoughSpace: The model does not fit in free memory.
            WeightsError: The model's files cannot be read.
            LaunchError: The port or the log file cannot be used.
        """
        check_memory(model_path, role="large")
        with _listen(port) as listener:
            process = _spawn(model_path, cache_dir=cache_dir, log_path=log_path, listener=listener)
            return cls(
                process,
                port=listener.getsockname()[1],
                log_path=log_path,
                model_bytes=memory_needed(model_path),
            )

    @property
    def url(self) -> str:
        """The base address of its OpenAI-compatible routes."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def wait_until_ready(
        self, *, timeout_s: float = 180.0, progress: Progress = no_progress
    ) -> None:
        """Return once the server has generated a token.

        Args:
            timeout_s: Seconds to wait. 180 by default.
            progress: Receives the bytes of the model in memory.

        Raises:
            LaunchError: The server ends, or generates no token in time.
        """
        # The port answers long before the model is loaded, so only a token proves it ready.
        deadline, total = Deadline(timeout_s), self._model_bytes
        transport = Transport(parse_address(self.url))
        try:
            exchange = transport.begin(
                f"{self.url}/completions", body=_FIRST_REQUEST, deadline=deadline
            )
            while exchange.is_alive():
                self._check_starting(deadline)
                progress(_LOADING, min(self._resident_bytes(), total), total)
                exchange.join(_POLL_S)
            if exchange.result().status != 200:
                raise self._failure("it cannot generate")
        except LargeError as exc:
            # The connection breaks a moment before the end of the child becomes visible.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_WAIT_S)
            self._check_starting(deadline)
            raise self._failure(str(exc)) from exc
        finally:
            transport.close()
        progress(_LOADING, total, total)

    def wait(self) -> int:
        """Block until the child ends; return its exit code (negative: the signal's number)."""
        return self._process.wait()

    def close(self) -> None:
        """End the child, by force after a grace period. Safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _check_starting(self, deadline: Deadline) -> None:
        """Raise LaunchError if the child has ended or the deadline is over."""
        code = self._process.poll()
        if code is not None:
            raise self._failure(f"it ended while starting ({_exit_reason(code)})")
        if not deadline.left_s():
            raise self._failure(f"it was not ready in {deadline.seconds:.3g} s")

    def _failure(self, reason: str) -> LaunchError:
        last_line = _last_message(self.log_path)
        detail = f": {last_line}" if last_line else ""
        return LaunchError(
            f"the local server did not start: {reason}{detail} (log: {self.log_path})"
        )

    def _resident_bytes(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0


def _exit_reason(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed, possibly because memory ran out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _listen(port: int | None) -> socket.socket:
    """Return a listening socket on loopback.

    It is bound here so that no other process can take the port before the child does.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port or 0))
        listener.listen(16)
    except (OSError, OverflowError) as exc:
        listener.close()
        reason = getattr(exc, "strerror", None) or "no such port"
        raise LaunchError(
            f"port {port} cannot be used ({reason}); choose another, or none for a free one",
            parameter="port",
        ) from exc
    return listener


def _spawn(
    model_path: Path, *, cache_dir: Path, log_path: Path, listener: socket.socket
) -> subprocess.Popen[bytes]:
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as exc:
        raise LaunchError(f"the log file {log_path} cannot be written ({exc.strerror})") from exc
    try:
        os.fchmod(log, 0o600)
        return subprocess.Popen(
            [
                # -P: modules in the current directory must not be imported.
                *(sys.executable, "-P", "-m", "mlxroute.hosting.mlx_lm_child"),
                *("--model", str(model_path), "--cache-dir", str(cache_dir)),
                *("--socket-fd", str(listener.fileno())),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": _import_path()},
            pass_fds=(listener.fileno(),),
            # A Ctrl-C in the terminal is meant for the answer, not for the server.
            start_new_session=True,
        )
    except OSError as exc:
        raise LaunchError(f"the local server could not be started ({exc.strerror})") from exc
    finally:
        os.close(log)


def _import_path() -> str:
    """Return a PYTHONPATH on which the child finds this package."""
    folder = Path(__file__).resolve().parents[2]
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def _last_message(log_path: Path) -> str:
    """Return the last message of a log, without the class name of an exception."""
    try:
        with log_path.open("rb") as stream:
            stream.seek(max(0, log_path.stat().st_size - _LOG_TAIL_BYTES))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    messages = [line for line in lines if line.strip() and not line.startswith((" ", "BLAS:"))]
    if not messages:
        return ""
    return printable_line(re.sub(r"^(?:\w+\.)*[A-Z]\w*: ", "", messages[-1]))
