"""Launch of a large model on this machine: a server as a child process on loopback.

The kind of model decides which: `mlx_lm.server` serves a model directory, and llama.cpp's
`llama-server` a GGUF file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Final

import psutil

from mlxroute.backend.load import check_memory, memory_needed
from mlxroute.closeable import Closeable
from mlxroute.errors import ConfigError, LargeError, LargeUnreachable, LaunchError
from mlxroute.hosting.child_log import failure_reason
from mlxroute.hosting.server_choice import choose_server
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.transport import Transport
from mlxroute.ports import check_port_free
from mlxroute.replace_file import make_private
from mlxroute.types import Progress, no_progress
from mlxroute.user_folders import check_temporary_folder, state_folder

_POLL_S: Final = 0.1
_STOP_GRACE_S: Final = 5.0
# How long after a failed reply the end of the child may become visible.
_EXIT_WAIT_S: Final = 1.0
_LOADING: Final = "loading the large model"
_STILL_LOADING: Final = 503
_BACKLOG: Final = 16
# Errors for a log in the cache of another user, or in a read-only one.
_DENIED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_FIRST_REQUEST: Final = b'{"prompt": "1, 2, 3,", "max_tokens": 1, "temperature": 0}'


class LocalServer(Closeable):
    """A running server of a large model, which ends at `close` or with this process.

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
        cls,
        model_path: Path,
        *,
        cache_dir: Path,
        log_path: Path,
        port: int | None = None,
        skip_memory_check: bool = False,
    ) -> LocalServer:
        """Start the child and return at once; call `wait_until_ready` before use.

        Args:
            model_path: Directory of the model to serve, or a GGUF file, whose name without
                `.gguf` becomes the name of the served model.
            cache_dir: Cache folder, which contains the faster BLAS.
            log_path: File for the child's output, which is overwritten. While another running
                server writes to it, the name gets a number, and where this user may not write it,
                it is in the state folder or a temporary one: `log_path` of the result.
            port: Port to listen on. None (default) for a free one.
            skip_memory_check: Whether to start it even if the model needs more memory than is
                free. False by default.

        Raises:
            ConfigError: There is no folder for temporary files.
            NotEnoughSpace: The model does not fit in free memory.
            WeightsError: The model's files cannot be read, or one is missing.
            LaunchError: The port or the log file cannot be used, or llama.cpp is missing.
        """
        check_temporary_folder()
        if not skip_memory_check:
            check_memory(model_path, role="large")
        model_bytes = memory_needed(model_path)
        server = choose_server(model_path)
        with _reserve(port) as bound:
            if server.takes_listening_socket:
                bound.listen(_BACKLOG)
            arguments = server.arguments(model_path, cache_dir)
            log, log_path = _open_log(log_path)
            try:
                process = _spawn([server.module, *arguments], log=log, bound=bound)
            finally:
                os.close(log)
            return cls(
                process,
                port=bound.getsockname()[1],
                log_path=log_path,
                model_bytes=model_bytes,
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
        deadline, total = Deadline(timeout_s), self._model_bytes
        transport = Transport(parse_address(self.url))
        try:
            while not self._generates(transport, deadline, progress):
                self._pause()
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

    def _generates(self, transport: Transport, deadline: Deadline, progress: Progress) -> bool:
        """Return whether the server generates a token; False while it is still loading.

        A port may answer long before the model is loaded, so only a token proves a server ready.
        """
        total = self._model_bytes
        exchange = transport.begin(
            f"{self.url}/completions", body=_FIRST_REQUEST, deadline=deadline
        )
        while exchange.is_alive():
            self._check_starting(deadline)
            progress(_LOADING, min(self._resident_bytes(), total), total)
            exchange.join(_POLL_S)
        try:
            status = exchange.result().status
        except LargeUnreachable:
            # Not listening yet, or about to end: the connection breaks a moment before that.
            return False
        except LargeError as exc:
            self._check_exit(deadline)
            raise self._failure(str(exc)) from exc
        if status not in (200, _STILL_LOADING):
            self._check_exit(deadline)
            raise self._failure("it cannot generate")
        return status == 200

    def _check_exit(self, deadline: Deadline) -> None:
        """Raise LaunchError if the child ends shortly after a failed reply."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_WAIT_S)
        self._check_starting(deadline)

    def _pause(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_POLL_S)

    def _check_starting(self, deadline: Deadline) -> None:
        """Raise LaunchError if the child has ended or the deadline is over."""
        code = self._process.poll()
        if code is not None:
            raise self._failure(f"it ended while starting ({_exit_reason(code)})")
        if not deadline.left_s():
            raise self._failure(f"it was not ready in {deadline.seconds:.3g} s")

    def _failure(self, reason: str) -> LaunchError:
        reason_logged = failure_reason(self.log_path)
        detail = f": {reason_logged}" if reason_logged else ""
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


def check_port(port: int | None) -> None:
    """Raise LaunchError if a server cannot be launched on a port of loopback."""
    _reserve(port).close()


def _reserve(port: int | None) -> socket.socket:
    """Return a socket bound to a port of loopback.

    The child inherits it, so no other process is given the port before the child listens.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        check_port_free("127.0.0.1", port or 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port or 0))
    except (OSError, OverflowError) as exc:
        bound.close()
        reason = getattr(exc, "strerror", None) or "no such port"
        raise LaunchError(
            f"port {port} cannot be used ({reason}); choose another, or none for a free one",
            parameter="port",
        ) from exc
    return bound


def _open_log(first: Path) -> tuple[int, Path]:
    """Return the emptied log of a new server, open and locked, and its path.

    The child inherits the lock and has it until its end.
    """
    try:
        try:
            return _open_numbered(first)
        except OSError as exc:
            if exc.errno not in _DENIED:
                raise
        with contextlib.suppress(OSError, ConfigError):
            return _open_numbered(state_folder() / first.name)
        return _open_numbered(Path(tempfile.mkdtemp(prefix="mlxroute-"), first.name))
    except OSError as exc:
        raise LaunchError(f"the log file {first} cannot be written ({exc.strerror})") from exc


def _open_numbered(first: Path) -> tuple[int, Path]:
    """Return the first log that no other server has; its name has a number if `first` is taken."""
    first.parent.mkdir(parents=True, exist_ok=True)
    numbered = (first.with_stem(f"{first.stem}-{number}") for number in count(2))
    for path in chain([first], numbered):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with contextlib.ExitStack() as unless_claimed:
            unless_claimed.callback(os.close, log)
            make_private(path)
            if _claimed(log):
                unless_claimed.pop_all()
                return log, path
    raise AssertionError("the numbers do not end")


def _claimed(log: int) -> bool:
    """Lock and empty a log; return False if another server has it."""
    if not stat.S_ISREG(os.fstat(log).st_mode):
        return True
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A file system without locks.
    os.ftruncate(log, 0)
    return True


def _spawn(command: Sequence[str], *, log: int, bound: socket.socket) -> subprocess.Popen[bytes]:
    """Start a module of this package as a child process, with its arguments and the socket."""
    try:
        return subprocess.Popen(
            # -P: modules in the current directory must not be imported.
            [sys.executable, "-P", "-m", *command, "--socket-fd", str(bound.fileno())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": _import_path()},
            pass_fds=(bound.fileno(),),
            # A Ctrl-C in the terminal is meant for the answer, not for the server.
            start_new_session=True,
        )
    except OSError as exc:
        raise LaunchError(f"the local server could not be started ({exc.strerror})") from exc


def _import_path() -> str:
    """Return a PYTHONPATH on which the child finds this package."""
    folder = Path(__file__).resolve().parents[2]
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
