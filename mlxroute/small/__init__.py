"""The small model, on this machine. MLX arrays stay here; the engine gets frozen values.

`SmallModel` can be imported without MLX. The other modules of this package import MLX at their
top: import them after `SmallModel.load` or `mlxroute.backend.blas.interpose`.
"""

from mlxroute.small.model import SmallModel

__all__ = ["SmallModel"]
