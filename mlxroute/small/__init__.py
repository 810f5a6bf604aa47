"""The on-device model. MLX arrays stop here; the rooms above see frozen values only."""

from mlxroute.small.model import SmallModel

__all__ = ["SmallModel"]
