"""The on-device model. MLX arrays stop here; other packages get frozen values.

`SmallModel` can be imported without MLX. Every other module of this package imports MLX at its
top, so import them after `SmallModel.load` or `mlxroute.backend.blas.interpose`.
"""

from mlxroute.small.model import SmallModel

__all__ = ["SmallModel"]
