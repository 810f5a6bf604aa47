"""A request for a model that belongs in the cache, answered from the cache or by a fetch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlxroute.errors import WeightsError
from mlxroute.types import Progress
from mlxroute.weights.store import MANIFEST, Manifest, Store, disk_errors, record_file


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Args:
        name: Name it was requested by.
        path: A directory that mlx_lm can load, or a GGUF file.
        source: Description of where it came from.
        fingerprint: Differs between contents of its files under one name. Empty (default) where
            the name stands for one content: a catalogue model of the package index.
    """

    name: str
    path: Path
    source: str
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class WeightsSize:
    """The memory that a model's weights take, known before they are fetched or converted.

    Args:
        name: Name the model was requested by.
        stored_bytes: Size as they are stored.
        float32_bytes: Size as dense float32.
    """

    name: str
    stored_bytes: int
    float32_bytes: int


PACKAGE_INDEX: Final = "package index"
"""The source of a catalogue model whose content the catalogue prescribes."""
FINGERPRINT_DIGITS: Final = 16
ANSWER_TIMEOUT_S: Final = 5.0
"""A source that does not answer for so long is unreachable."""
STALL_TIMEOUT_S: Final = 60.0
"""A download without data for so long has failed."""
PARALLEL_DOWNLOADS: Final = 3

CheckSize = Callable[[WeightsSize], None]
"""Raises NotEnoughSpace for weights that do not fit in memory."""


def accept_any_size(size: WeightsSize) -> None:
    """Accept weights of any size."""


def accept_unchecked() -> None:
    """Check nothing before a fetch."""


@dataclass(frozen=True, slots=True)
class StagedModel:
    """A model directory ready to be stored.

    Args:
        path: The directory.
        source: Description of where it came from.
        sha256: The hashes of files that are already known, by name.
        fingerprint: What it was made from, if files of the same source may differ. Empty by
            default.
    """

    path: Path
    source: str
    sha256: Mapping[str, str]
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for a model that belongs in the cache.

    Args:
        name: Name it was requested by.
        key: Its key in the cache.
        is_current: Whether a manifest is of what is requested now.
        needs_network: Whether fetching it needs the network.
        fetch: Makes its directory in a staging folder: fetches, verifies and converts.
        gguf_file: Name of the GGUF file in its directory. Empty (default) if it is converted.
        check: Raises an error for what cannot be fetched or does not fit, before anything is
            written. Checks nothing by default.
    """

    name: str
    key: str
    is_current: Callable[[Manifest], bool]
    needs_network: bool
    fetch: Callable[[Path], StagedModel]
    gguf_file: str = ""
    check: Callable[[], None] = accept_unchecked

    def model_in(self, folder: Path, manifest: Manifest) -> LocalModel:
        """Return the model in its finished directory."""
        path = folder / self.gguf_file
        return LocalModel(self.name, path, manifest.source, _fingerprint(manifest))


def _fingerprint(manifest: Manifest) -> str:
    if manifest.source == PACKAGE_INDEX:
        return ""
    hashes = sorted((name, record.sha256) for name, record in manifest.files.items())
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def find_cached(
    store: Store, request: Request, *, hash_progress: Progress | None = None
) -> LocalModel | None:
    """Return the cached model; None if it is absent, or is not of what is requested now.

    With `hash_progress`, hash all files. Raises CorruptWeights for a damaged entry.
    """
    manifest = store.read_manifest(request.key, name=request.name)
    if manifest is None or not request.is_current(manifest):
        return None
    if hash_progress is None:
        store.check(request.key, manifest)
    else:
        store.verify(request.key, manifest, progress=hash_progress)
    return request.model_in(store.model_dir(request.key), manifest)


def check_fetch(store: Store, request: Request, *, offline: bool) -> None:
    """Raise WeightsError, before anything is written, if the model cannot be fetched.

    It cannot if `offline` forbids the fetch that it needs, and if its own check fails.
    """
    if offline and request.needs_network:
        flag = " --gguf" if request.gguf_file else ""
        raise WeightsError(
            f"{request.name} is not in the cache ({store.root}) and cannot be fetched offline: "
            f"run `mlxroute pull {request.name}{flag}` while online",
            parameter="offline",
        )
    request.check()


def fetch_and_store(store: Store, request: Request, *, staging_key: str) -> LocalModel:
    """Fetch the model and store it in the cache; raise WeightsError if no source has it."""
    try:
        staged = request.fetch(store.staging_dir(staging_key))
        with disk_errors(store.root):
            files = {
                file.name: record_file(file, sha256=staged.sha256.get(file.name))
                for file in sorted(staged.path.iterdir())
                if file.is_file() and file.name != MANIFEST
            }
        manifest = Manifest(request.name, staged.source, staged.fingerprint, files)
        path = store.commit(request.key, staged.path, manifest)
    except BaseException:
        # An unfinished download is kept, to be resumed by the next run.
        store.trim_staging(staging_key)
        raise
    store.remove_staging(staging_key)
    return request.model_in(path, manifest)
