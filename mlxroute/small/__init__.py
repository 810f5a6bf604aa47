"""The on-device model. MLX arrays stop here; the rooms above see frozen values only."""

from mlxroute.small.batch import Batch
from mlxroute.small.decoder import ScoredText
from mlxroute.small.kv_cache import CacheCopy
from mlxroute.small.model import SmallModel

__all__ = ["Batch", "CacheCopy", "ScoredText", "SmallModel"]
