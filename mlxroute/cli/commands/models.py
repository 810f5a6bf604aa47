"""`models`: list the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import Settings, user_catalog_dir

if TYPE_CHECKING:
    from pathlib import Path

    from mlxroute.catalog import Catalog


def models(settings: Settings) -> int:
    """List the models and pairs of the catalogue."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.terminal import (
        make_consoles,
        make_fitting_table,
        print_labelled,
        print_table,
    )

    out, _ = make_consoles()
    catalog = Catalog.load(user_catalog_dir())
    folder = cache_dir_of(settings)
    columns = ("model", "parameters", "hub", "index", "cached", "licence")
    rows = list(_model_rows(catalog, folder))
    print_table(out, make_fitting_table(columns, rows, console=out, essential=(0, 2, 4)))
    out.print()
    pair_columns = ("small", "large", "threshold", "calibration")
    pairs = [
        (pair.small, pair.large, f"{pair.threshold:g} nats", pair.calibration)
        for pair in catalog.pairs
    ]
    print_table(out, make_fitting_table(pair_columns, pairs, console=out, essential=(0, 1)))
    out.print()
    print_labelled(out, "cache: ", str(folder))
    return 0


def _model_rows(catalog: Catalog, folder: Path) -> Iterator[tuple[str, ...]]:
    """Yield the models of the catalogue, then cached ones that it does not name."""
    from mlxroute.weights import list_cached

    cached: dict[str, int] = {}
    for entry in list_cached(folder):
        cached[entry.name] = cached.get(entry.name, 0) + entry.size_bytes
    for model in catalog.models:
        size = cached.pop(model.name, None)
        yield (
            model.name,
            f"{model.parameters / 1e9:.2f} B",
            _gigabytes(model.hub_bytes),
            _gigabytes(model.index.gguf_bytes) if model.index else "",
            "" if size is None else _gigabytes(size),
            model.license,
        )
    for name, size in cached.items():
        yield name, "", "", "", _gigabytes(size), ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
