"""The logit kernel: from a row of logits to the packed row that holds all a router needs."""

from mlxroute.small.kernels.packed_row import unpack_signals
from mlxroute.small.kernels.selection import Kernel, select_kernel

__all__ = ["Kernel", "select_kernel", "unpack_signals"]
