"""Values that the shell completes, beside those that typer completes by itself."""

from __future__ import annotations

from mlxroute.config import user_catalog_dir
from mlxroute.errors import MlxRouteError


def complete_model(incomplete: str) -> list[str]:
    """Return the catalogue's models whose names begin with what is typed."""
    from mlxroute.catalog import Catalog

    try:
        models = Catalog.load(user_catalog_dir()).models
    except MlxRouteError:
        return []
    return [model.name for model in models if model.name.startswith(incomplete)]
