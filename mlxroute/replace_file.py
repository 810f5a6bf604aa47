"""Files that are replaced in one step, that only their owner can read, or that a process locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mlxroute.errors import UsageError
from mlxroute.user_folders import expand_user

# What `flock` raises on file systems without locks, such as some network ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def replacement(path: Path, *, mode: int = 0o666, durable: bool = False) -> Iterator[Path]:
    """Yield a new empty file in the folder of `path`, which becomes `path` when the block ends.

    Readers get the old file or the new one, and several processes may replace it at the same time;
    the last one wins. A failure leaves no temporary file behind.

    Args:
        path: File to replace or create.
        mode: Its permissions, from which the umask is taken. Readable by all by default.
        durable: Whether the data must be on the disk before the rename. False by default.

    Raises:
        OSError: The file cannot be written.
    """
    number = f"{os.getpid()}-{os.urandom(4).hex()}"
    # A name has at most 255 bytes, a character up to 4.
    name = path.with_name(f".{path.stem[:25]}.{number}{path.suffix[:20]}")
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield name
        if durable:
            with name.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename is None:
            # A write to a full disk fails without the name of the file.
            error.filename = str(path)
        raise


def replace_file(path: Path, data: bytes, *, mode: int = 0o666, durable: bool = False) -> None:
    """Write a file with `replacement`; `data` is its content. Raises OSError if that fails."""
    with replacement(path, mode=mode, durable=durable) as name:
        name.write_bytes(data)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that a user named; only they can read it. A link is followed.

    Args:
        path: File to replace or create.
        data: Its new content.

    Raises:
        UsageError: The file cannot be written, or is a device, a pipe or a folder.
    """
    try:
        target = find_target(path)
        replace_file(target, data, mode=0o600, durable=True)
    except OSError as error:
        raise UsageError(f"cannot save to {path}: {error.strerror}") from error


def find_target(path: Path) -> Path:
    """Return the file that `path` names or links to.

    Raises UsageError if it is not a regular file, its folder is missing or cannot be written, or
    its name is impossible.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"cannot save to {path}: it is not a regular file")
    target = Path(os.path.realpath(path))
    if obstacle := _find_obstacle(target, target.parent):
        raise UsageError(f"cannot save to {path}: {obstacle}")
    return target


def is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths that a user named are, or would be, one file."""
    path, other = expand_user(path), expand_user(other)
    try:
        return path.samefile(other)
    except OSError:
        # One of them does not exist yet.
        return os.path.realpath(path) == os.path.realpath(other)


def check_creatable(path: Path, *, parameter: str | None = None) -> None:
    """Check, before long work, that a file can be made together with the folders it lacks.

    Args:
        path: The file.
        parameter: Name of the argument that gave it. None (default) for none.

    Raises:
        UsageError: It cannot be made.
    """
    path = path.absolute()
    folder = next(parent for parent in path.parents if os.path.exists(parent))
    if obstacle := _find_obstacle(path, folder):
        raise UsageError(f"cannot save to {path}: {obstacle}", parameter=parameter)


def _find_obstacle(path: Path, folder: Path) -> str | None:
    """Return why `path` cannot be made below a folder; None if it can."""
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} is not a folder to write to"
    for part in path.relative_to(folder).parts:
        try:
            os.lstat(folder / part)
        except FileNotFoundError:
            continue
        except OSError as error:
            return str(error.strerror)
    return None


def make_private(path: Path) -> None:
    """Let only its owner read a file; a link, a device or a pipe keeps its mode. Raises OSError."""
    if stat.S_ISREG(path.lstat().st_mode):
        path.chmod(0o600)


def lock_file(path: Path, *, on_wait: Callable[[], None]) -> BinaryIO | None:
    """Make a file and lock it for this process; whoever has the lock may delete the file.

    Args:
        path: The file.
        on_wait: Called before the wait for another process that has the lock.

    Returns:
        The open file, whose end is that of the lock; None on a file system without locks.

    Raises:
        OSError: The file cannot be written.
    """
    while True:
        handle = open(path, "wb")  # noqa: SIM115
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            # The process that had the lock removes the file, and another may have made it again.
            if _is_at(path, handle):
                return handle
            handle.close()
        except OSError as exc:
            handle.close()
            if exc.errno in _NO_LOCKS:
                return None
            raise


def _is_at(path: Path, handle: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False
