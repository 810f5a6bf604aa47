"""`models`: list the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import Settings, user_catalog_dir

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from mlxroute.catalog import Catalog


def models(settings: Settings) -> int:
    """List the models and pairs of the catalogue."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.terminal import make_consoles, make_table

    out, _ = make_consoles()
    catalog = Catalog.load(user_catalog_dir())
    folder = cache_dir_of(settings)
    out.print(_model_table(catalog, folder))
    out.print()
    pairs = make_table("small", "large", "threshold", "calibration", fold=True)
    for pair in catalog.pairs:
        pairs.add_row(pair.small, pair.large, f"{pair.threshold:g} nats", pair.calibration)
    out.print(pairs)
    out.print(f"\ncache: {folder}", soft_wrap=True, markup=False)
    return 0


def _model_table(catalog: Catalog, folder: Path) -> Table:
    """Return the models of the catalogue, then cached ones that it does not name."""
    from mlxroute.cli.terminal import make_table
    from mlxroute.weights import list_cached

    cached: dict[str, int] = {}
    for entry in list_cached(folder):
        cached[entry.name] = cached.get(entry.name, 0) + entry.size_bytes
    columns = ("model", "parameters", "hub", "index", "cached", "licence")
    table = make_table(*columns, fold=True)
    for model in catalog.models:
        size = cached.pop(model.name, None)
        table.add_row(
            model.name,
            f"{model.parameters / 1e9:.2f} B",
            _gigabytes(model.hub_bytes),
            _gigabytes(model.index.gguf_bytes) if model.index else "",
            "" if size is None else _gigabytes(size),
            model.license,
        )
    for name, size in cached.items():
        table.add_row(name, "", "", "", _gigabytes(size), "")
    return table


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
