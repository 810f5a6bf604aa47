"""`models` and `pull`."""

from __future__ import annotations

from mlxroute.catalog import Catalog, Model
from mlxroute.cli.app import cache_dir_of
from mlxroute.config import Settings


def list_models(settings: Settings) -> int:
    """Print what has a name, what is cached, and which pairs go together."""
    from rich.table import Table

    from mlxroute.cli.output import consoles
    from mlxroute.weights import cached

    out, _ = consoles()
    catalog = Catalog.load()
    folder = cache_dir_of(settings.cache_dir)
    here = {entry.name: entry for entry in cached(folder)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "parameters", "download", "licence", "cached"):
        table.add_column(column, overflow="fold")
    for model in catalog.models:
        entry = here.pop(model.name, None)
        size = f"{entry.size_bytes / 1e9:.1f} GB" if entry else ""
        table.add_row(
            model.name, f"{model.parameters / 1e9:.2f} B", _download(model), model.license, size
        )
    for entry in here.values():
        table.add_row(entry.name, "", "", "", f"{entry.size_bytes / 1e9:.1f} GB")
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


def _download(model: Model) -> str:
    sizes = [f"{model.hub_bytes / 1e9:.1f} GB hub"]
    if model.index is not None:
        sizes.append(f"{model.index.gguf_bytes / 1e9:.1f} GB index")
    return ", ".join(sizes)


def pull_model(name: str, settings: Settings) -> int:
    """Fetch and verify a model; print the folder it is in."""
    from mlxroute.cli.output import consoles
    from mlxroute.cli.progress import Reporter
    from mlxroute.weights import pull

    out, err = consoles()
    with Reporter(err) as reporter:
        local = pull(
            name,
            catalog=Catalog.load(),
            cache_dir=cache_dir_of(settings.cache_dir),
            offline=settings.offline,
            progress=reporter.progress,
            notify=reporter.notify,
        )
    err.print(f"{local.name}: verified ({local.source})", style="dim", markup=False)
    out.print(str(local.path), soft_wrap=True, markup=False)
    return 0
