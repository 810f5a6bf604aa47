"""The catalogue: named models and pairs, score ranks and learned heads, shipped or the user's."""

from mlxroute.catalog.catalog import Catalog, IndexPart, IndexSource, Model, Pair, shipped_dir

__all__ = ["Catalog", "IndexPart", "IndexSource", "Model", "Pair", "shipped_dir"]
