"""Where things are kept."""

from __future__ import annotations

import re
from pathlib import Path

from mlxroute.config import Settings
from mlxroute.errors import UsageError

RESULTS = Path("bench", "results")


def cache_dir_of(cache_dir: str | None) -> Path:
    """The folder weights are kept in."""
    from mlxroute.weights import default_cache_dir

    return Path(cache_dir).expanduser() if cache_dir else default_cache_dir()


def bench_file(folder: str, name: str) -> Path:
    """A file of `bench/` in the repository, or its copy in an installed package."""
    package = Path(__file__).parents[1]
    for parent in (package / f"_{folder}", package.parent / "bench" / folder):
        if (file := parent / name).is_file():
            return file
    raise UsageError(f"bench/{folder}/{name} is not installed; run it from the repository")


def record_file(settings: Settings, kind: str, small: str, large: str) -> Path:
    """Where a kind of record of two models is kept; its folder is made."""
    folder = cache_dir_of(settings.cache_dir) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{kind}-{_plain(small)}-{_plain(large)}.jsonl"


def source(data: Path) -> str:
    """A data file's name with its folder's, as `csqa/test.jsonl`."""
    return "/".join(data.absolute().parts[-2:])


def _plain(name: str) -> str:
    """A model's name, or the end of its path, fit for a file's."""
    return re.sub(r"[^\w.-]+", "-", Path(name).name)
