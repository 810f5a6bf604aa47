"""Fetching a model directory from the Hugging Face hub, with the hub's own client."""

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
from mlxroute.weights.byte_counter import Meter
from mlxroute.weights.store import disk_errors, require_space, sha256_of

ANSWER_S = 5.0
PARALLEL = 3

# What mlx_lm loads; never Python files, never other folders of the repository.
_WANTED = ("*.json", "*.jsonl", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")


# Hubs that kept this process waiting once; the next model need not wait for them again.
_silent: set[str] = set()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A downloaded repository: its commit, and the verified SHA-256 of each large file."""

    revision: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _File:
    """What the hub says about a file; `sha256` for large files, the git `blob_id` for small."""

    size: int
    sha256: str | None
    blob_id: str | None


def is_reachable() -> bool:
    """Whether the hub gives any answer within five seconds."""
    try:
        with ThreadPool(1) as pool:
            options = {"timeout": ANSWER_S}
            pool.apply_async(get_session().head, (constants.ENDPOINT,), options).get(ANSWER_S)
    except (HTTPError, OSError, ValueError, ImportError, PoolTimeout):
        return False
    return True


def fetch_snapshot(hub_id: str, folder: Path, *, progress: Progress) -> Snapshot:
    """Download a model repository into `folder` and verify every file.

    Files that arrived whole in an earlier run are kept. Raises SourceUnreachable when the hub
    does not answer within five seconds, or does not have the model. `progress` may be called
    from several threads, one at a time.
    """
    info = _ask(hub_id)
    files = {
        s.rfilename: _File(s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or ()
        if "/" not in s.rfilename and any(fnmatch(s.rfilename, glob) for glob in _WANTED)
    }
    if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
        raise WeightsError(f"{hub_id} on the hub has no config.json with model*.safetensors")
    with disk_errors(folder):
        # The client starts such a file anew; it would only take space.
        for orphan in folder.rglob("*.incomplete"):
            orphan.unlink()
        missing = sum(file.size for name, file in files.items() if not (folder / name).exists())
        require_space(folder, missing, purpose=f"downloading {hub_id}")
        _download(hub_id, str(info.sha), files, folder, progress)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    return Snapshot(str(info.sha), {f: i.sha256 for f, i in files.items() if i.sha256 is not None})


def _ask(hub_id: str) -> ModelInfo:
    """The repository's file list. In a daemon thread: a name look-up cannot be given a timeout."""
    if constants.ENDPOINT in _silent:
        raise SourceUnreachable("hub: no answer a moment ago")
    try:
        with ThreadPool(1) as pool:
            options = {"files_metadata": True, "timeout": ANSWER_S}
            return pool.apply_async(HfApi().model_info, (hub_id,), options).get(ANSWER_S)
    except PoolTimeout as exc:
        _silent.add(constants.ENDPOINT)
        raise SourceUnreachable(f"hub: no answer within {ANSWER_S:.0f} s") from exc
    except GatedRepoError as exc:
        raise SourceUnreachable(
            f"hub: {hub_id} asks you to accept its licence on its page and to set HF_TOKEN"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise SourceUnreachable(
            f"hub: no repository {hub_id} (a private one needs HF_TOKEN)"
        ) from exc
    except (HTTPError, OSError, ValueError, ImportError) as exc:
        # An ImportError: the client lacks what a SOCKS proxy in the environment needs.
        raise SourceUnreachable(f"hub: not reachable ({_brief(exc)})") from exc


def _download(
    hub_id: str, revision: str, files: Mapping[str, _File], folder: Path, progress: Progress
) -> None:
    total = sum(file.size for file in files.values())
    meter = Meter(f"downloading {hub_id}", total=total, progress=progress)
    bar_class = _bar_class(meter)

    def download(name: str) -> None:
        if (folder / name).exists():
            meter.add(files[name].size)
        hf_hub_download(hub_id, name, revision=revision, local_dir=folder, tqdm_class=bar_class)
        _verify(folder / name, files[name], hub_id)

    try:
        # Daemon threads: Ctrl-C must not wait for gigabytes under way.
        with ThreadPool(PARALLEL) as pool:
            for _ in pool.imap_unordered(download, sorted(files)):
                pass
    except (HTTPError, OSError, RuntimeError, XetDownloadError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        # No other source or model is tried: what arrived is kept for the next run.
        raise WeightsError(
            f"the download of {hub_id} broke off ({_brief(exc)}): run the same command again"
        ) from exc


def _verify(path: Path, wanted: _File, hub_id: str) -> None:
    """Compare with what the hub published; an altered file is deleted."""
    if wanted.sha256 is not None:
        intact = sha256_of(path) == wanted.sha256
    else:
        content = path.read_bytes()
        blob = b"blob %d\0" % len(content) + content
        intact = hashlib.sha1(blob, usedforsecurity=False).hexdigest() == wanted.blob_id
    if not intact:
        path.unlink()
        raise CorruptWeights(
            f"{path.name} of {hub_id} is not the file the hub lists (its hash differs), so it was "
            "deleted: run the same command again"
        )


def _bar_class(meter: Meter) -> type[Any]:
    """A progress bar for the client that draws nothing and feeds the meter."""

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            meter.add(int(n or 0))

        # With these two the client counts network bytes apart, not a second time through update.
        def update_transfer(self, n: float) -> None: ...

        def set_transfer_postfix_str(self, *args: Any, **options: Any) -> None: ...

    return Bar


def _brief(exc: Exception) -> str:
    text = str(exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
