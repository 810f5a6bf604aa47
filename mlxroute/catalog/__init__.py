"""The catalogue of models, with their score ranks and learned heads, shipped or user-defined."""

from mlxroute.catalog.catalog import Catalog, IndexPart, IndexSource, Model, Pair, shipped_dir

__all__ = ["Catalog", "IndexPart", "IndexSource", "Model", "Pair", "shipped_dir"]
