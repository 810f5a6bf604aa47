"""The Hugging Face hub as a source of model directories, through the hub's own client."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import TimeoutError as PoolTimeout
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_download

# The base error of whichever HTTP library the installed client is built on.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    XetDownloadError,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from mlxroute.errors import CorruptWeights, SourceUnreachable, WeightsError
from mlxroute.types import Progress
from mlxroute.weights.byte_counter import ByteCounter
from mlxroute.weights.store import disk_errors, require_space, sha256_of

ANSWER_TIMEOUT_S = 5.0
PARALLEL_DOWNLOADS = 3

# Top-level files that mlx_lm reads. Python files are never fetched.
_MODEL_FILES = (
    "*.json",
    "*.jsonl",
    "model*.safetensors",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
)

# Hubs that timed out in this process; they are not tried again.
_unresponsive_hubs: set[str] = set()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A downloaded repository: its commit, and the verified SHA-256 of each large file by name."""

    revision: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _ListedFile:
    """A file in the hub's listing: large files have a `sha256`, small ones a git `blob_id`."""

    size: int
    sha256: str | None
    blob_id: str | None


def is_reachable() -> bool:
    """Return whether the hub answers within five seconds."""
    try:
        with ThreadPool(1) as pool:
            options = {"timeout": ANSWER_TIMEOUT_S}
            request = pool.apply_async(get_session().head, (constants.ENDPOINT,), options)
            request.get(ANSWER_TIMEOUT_S)
    except (HTTPError, OSError, ValueError, ImportError, PoolTimeout):
        return False
    return True


def fetch_snapshot(hub_id: str, folder: Path, *, progress: Progress) -> Snapshot:
    """Download a model repository and verify every file. Keeps complete files of an earlier run.

    Args:
        hub_id: The repository, `org/name`.
        folder: Where its files are written.
        progress: Receives the bytes so far; called from several threads, one at a time.

    Raises:
        SourceUnreachable: The hub does not answer within five seconds, or lacks the model.
        CorruptWeights: A file differs from the hub's listing.
        WeightsError: The repository has no MLX weights, or the download fails.
    """
    info = _fetch_listing(hub_id)
    files = {
        entry.rfilename: _ListedFile(
            entry.size or 0, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
        )
        for entry in info.siblings or ()
        if "/" not in entry.rfilename
        and any(fnmatch(entry.rfilename, glob) for glob in _MODEL_FILES)
    }
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise WeightsError(f"{hub_id} on the hub has no config.json with model*.safetensors")
    with disk_errors(folder):
        # The client does not resume files of an earlier run; they only take up space.
        for unfinished in folder.rglob("*.incomplete"):
            unfinished.unlink()
        missing_bytes = sum(
            file.size for name, file in files.items() if not (folder / name).exists()
        )
        require_space(folder, missing_bytes, purpose=f"downloading {hub_id}")
        _download(hub_id, str(info.sha), files, folder, progress)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    hashes = {name: file.sha256 for name, file in files.items() if file.sha256 is not None}
    return Snapshot(str(info.sha), hashes)


def _fetch_listing(hub_id: str) -> ModelInfo:
    """Return the repository's listing; raise SourceUnreachable if the hub gives none.

    The request runs in a daemon thread, because a name look-up has no timeout.
    """
    if constants.ENDPOINT in _unresponsive_hubs:
        raise SourceUnreachable("hub: it did not answer an earlier request")
    try:
        with ThreadPool(1) as pool:
            options = {"files_metadata": True, "timeout": ANSWER_TIMEOUT_S}
            return pool.apply_async(HfApi().model_info, (hub_id,), options).get(ANSWER_TIMEOUT_S)
    except PoolTimeout as exc:
        _unresponsive_hubs.add(constants.ENDPOINT)
        raise SourceUnreachable(f"hub: no answer within {ANSWER_TIMEOUT_S:.0f} s") from exc
    except GatedRepoError as exc:
        raise SourceUnreachable(
            f"hub: {hub_id} asks you to accept its licence on its page and to set HF_TOKEN"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise SourceUnreachable(
            f"hub: no repository {hub_id} (a private one needs HF_TOKEN)"
        ) from exc
    except (HTTPError, OSError, ValueError, ImportError) as exc:
        # ImportError: a SOCKS proxy is set and the package it needs is not installed.
        raise SourceUnreachable(f"hub: not reachable ({_reason(exc)})") from exc


def _download(
    hub_id: str, revision: str, files: Mapping[str, _ListedFile], folder: Path, progress: Progress
) -> None:
    total = sum(file.size for file in files.values())
    counter = ByteCounter(f"downloading {hub_id}", total=total, progress=progress)
    bar_class = _progress_bar_class(counter)

    def download(name: str) -> None:
        if (folder / name).exists():
            counter.add(files[name].size)
        hf_hub_download(hub_id, name, revision=revision, local_dir=folder, tqdm_class=bar_class)
        _verify(folder / name, files[name], hub_id)

    try:
        # Daemon threads: Ctrl-C must not wait for downloads to end.
        with ThreadPool(PARALLEL_DOWNLOADS) as pool:
            for _ in pool.imap_unordered(download, sorted(files)):
                pass
    except (HTTPError, OSError, RuntimeError, XetDownloadError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        # Not SourceUnreachable: the next run resumes here, and no other source is tried.
        raise WeightsError(
            f"the download of {hub_id} was interrupted ({_reason(exc)}): run the same command again"
        ) from exc


def _verify(path: Path, listed: _ListedFile, hub_id: str) -> None:
    """Compare a file's hash with the listed one; delete the file and raise if they differ."""
    if listed.sha256 is not None:
        intact = sha256_of(path) == listed.sha256
    else:
        content = path.read_bytes()
        blob = b"blob %d\0" % len(content) + content
        intact = hashlib.sha1(blob, usedforsecurity=False).hexdigest() == listed.blob_id
    if not intact:
        path.unlink()
        raise CorruptWeights(
            f"{path.name} of {hub_id} is not the file the hub lists (its hash differs), so it was "
            "deleted: run the same command again"
        )


def _progress_bar_class(counter: ByteCounter) -> type[Any]:
    """Return a progress bar class for the client that draws nothing and counts bytes."""

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            counter.add(int(n or 0))

        # If these exist, the client reports network bytes to them and not twice to `update`.
        def update_transfer(self, n: float) -> None: ...

        def set_transfer_postfix_str(self, *args: Any, **options: Any) -> None: ...

    return Bar


def _reason(exc: Exception) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
