"""`models` and `pull`."""

from __future__ import annotations

from mlxroute.catalog import Catalog
from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import Settings, user_catalog_dir


def list_models(settings: Settings) -> int:
    """Print what has a name, what is cached, and which pairs go together."""
    from rich.table import Table

    from mlxroute.cli.terminal import consoles
    from mlxroute.weights import list_cached

    out, _ = consoles()
    catalog = Catalog.load(user_catalog_dir())
    folder = cache_dir_of(settings.cache_dir)
    here = {entry.name: entry for entry in list_cached(folder)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "parameters", "hub", "index", "cached", "licence"):
        table.add_column(column, overflow="fold")
    for model in catalog.models:
        entry = here.pop(model.name, None)
        table.add_row(
            model.name,
            f"{model.parameters / 1e9:.2f} B",
            _gigabytes(model.hub_bytes),
            _gigabytes(model.index.gguf_bytes) if model.index else "",
            _gigabytes(entry.size_bytes) if entry else "",
            model.license,
        )
    for entry in here.values():
        table.add_row(entry.name, "", "", "", _gigabytes(entry.size_bytes), "")
    out.print(table)
    out.print()
    pairs = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("small", "large", "threshold", "calibration"):
        pairs.add_column(column, overflow="fold")
    for pair in catalog.pairs:
        pairs.add_row(pair.small, pair.large, f"{pair.threshold:g} nats", pair.calibration)
    out.print(pairs)
    out.print(f"\ncache: {folder}", soft_wrap=True, markup=False)
    return 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def pull_model(name: str, settings: Settings) -> int:
    """Fetch and verify a model; print the folder it is in."""
    from mlxroute.cli.progress import Reporter
    from mlxroute.cli.terminal import consoles
    from mlxroute.weights import pull

    out, err = consoles()
    with Reporter(err) as reporter:
        local = pull(
            name,
            catalog=Catalog.load(user_catalog_dir()),
            cache_dir=cache_dir_of(settings.cache_dir),
            offline=settings.offline,
            progress=reporter.progress,
            notify=reporter.notify,
        )
    what = "used as it is" if local.source == "directory" else f"verified ({local.source})"
    err.print(f"{local.name}: {what}", style="dim", markup=False)
    out.print(str(local.path), soft_wrap=True, markup=False)
    return 0
