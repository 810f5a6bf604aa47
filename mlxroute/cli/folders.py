"""Folders and files of the command line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.replace_file import check_creatable
from mlxroute.user_folders import cache_folder, expand_user

RESULTS = Path("bench", "results")
# File systems allow 255 bytes; a character has up to 4.
_NAME_CHARACTERS = 50


def cache_dir_of(settings: Settings) -> Path:
    """Return the folder of the model weights."""
    return expand_user(settings.cache_dir) if settings.cache_dir else cache_folder()


def expand_optional(path: str | None) -> Path | None:
    """Return a path of the settings with `~` expanded, None if it is not set."""
    return None if path is None else expand_user(path)


def output_folder(path: Path) -> Path:
    """Return the folder that `--out` names, with `~` expanded.

    Raises UsageError if no file could be written in it, or it could not be made.
    """
    folder = expand_user(path)
    check_creatable(folder / "file", parameter="out")
    return folder


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder if there is none, and keep other runs out of it; if it stays empty, remove it.

    Raises UsageError if another run has it. On a file system without locks, no run is kept out.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(handle)
        raise UsageError(
            f"another run writes to {folder}; wait for its end, or choose a new folder",
            parameter="out",
        ) from exc
    except OSError:
        pass  # A file system without locks.
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(handle)


def find_bench_file(folder: str, name: str) -> Path:
    """Return a file of `bench/` in the repository, or its copy in an installed package.

    Raises UsageError if there is neither.
    """
    package = Path(__file__).parents[1]
    for parent in (package / f"_{folder}", package.parent / "bench" / folder):
        if (file := parent / name).is_file():
            return file
    raise UsageError(f"bench/{folder}/{name} is not installed; run this in the repository")


def record_path(settings: Settings, kind: str, small: str, large: str) -> Path:
    """Return the path of the file that keeps a kind of records of a pair; create its folder.

    `large` is the large model's name in records. Names that are shortened still differ.
    """
    folder = cache_dir_of(settings) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    name = model_file_name(large)
    if name != large:
        import hashlib

        name = f"{name}-{hashlib.sha256(large.encode()).hexdigest()[:8]}"
    return folder / f"{kind}-{model_file_name(small)}-{name}.jsonl"


def host_log(cache_dir: Path) -> Path:
    """Return the log file of a server started on this machine."""
    return cache_dir / "logs" / "host.log"


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def data_name(data: Path) -> str:
    """Return the name of a data file with that of its folder, as `csqa/test.jsonl`."""
    return "/".join(data.absolute().parts[-2:])


def report_source(data: Path) -> str:
    """Return the name of a data file as reports of `bench` give it: `csqa-test`."""
    return f"{data.absolute().parent.name}-{data.stem}"


def model_file_name(model: str) -> str:
    """Return a model's name, or the last part of its path, as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", Path(model).name)[:_NAME_CHARACTERS]
