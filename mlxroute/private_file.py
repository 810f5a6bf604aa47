"""Files that hold a conversation: written in one step, readable by their owner only."""

from __future__ import annotations

import os
from pathlib import Path

from mlxroute.errors import UsageError
from mlxroute.replace_file import replace_file
from mlxroute.user_folders import expand_user


def expand_path(path: Path) -> Path:
    """Return a path that a user typed, expanded as by `expand_user`.

    Raises also UsageError for a NUL character.
    """
    if "\0" in str(path):
        raise UsageError("a file name cannot contain a NUL character")
    return expand_user(path)


def write_private(path: Path, data: bytes) -> None:
    """Replace a file in one step; a link is followed. Raises UsageError if that fails.

    A temporary file beside it is renamed, so that no half file is left.
    """
    target = Path(os.path.realpath(path))
    try:
        replace_file(target, data, mode=0o600, durable=True)
    except OSError as error:
        raise UsageError(f"cannot save to {path}: {error.strerror}") from error
