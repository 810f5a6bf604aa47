"""Files that are replaced in one step, and files that only their owner can read."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mlxroute.errors import UsageError


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
    name = path.with_name(f".{path.stem[:100]}.{number}{path.suffix[:20]}")
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
    """Return the file that `path` names or links to. Raises UsageError if it is no regular file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"cannot save to {path}: it is not a regular file")
    return Path(os.path.realpath(path))


def make_private(path: Path) -> None:
    """Let only its owner read a file; a link, a device or a pipe keeps its mode. Raises OSError."""
    if stat.S_ISREG(path.lstat().st_mode):
        path.chmod(0o600)
