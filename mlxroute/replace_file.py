"""Replacement of a file in one step."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mlxroute.errors import UsageError


def replace_file(path: Path, data: bytes, *, mode: int = 0o666, durable: bool = False) -> None:
    """Write a file in its folder under a name of its own, and rename it to `path`.

    Readers get the old file or the new one, and several processes may replace it at the same time;
    the last one wins. A failure leaves no temporary file behind.

    Args:
        path: File to replace or create.
        data: Its new content.
        mode: Its permissions, from which the umask is taken. Readable by all by default.
        durable: Whether the data must be on the disk before the rename. False by default.

    Raises:
        OSError: The file cannot be written.
    """
    name = path.with_name(f".{path.name[:100]}.{os.getpid()}-{os.urandom(4).hex()}")
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that a user named; only they can read it. A link is followed.

    Args:
        path: File to replace or create.
        data: Its new content.

    Raises:
        UsageError: The file cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        replace_file(target, data, mode=0o600, durable=True)
    except OSError as error:
        raise UsageError(f"cannot save to {path}: {error.strerror}") from error
