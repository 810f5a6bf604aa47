"""The logit kernel: computes a packed row, which holds the signals, from a row of logits."""

from mlxroute.small.kernels.packed_row import unpack_signals
from mlxroute.small.kernels.selection import Kernel, select_kernel

__all__ = ["Kernel", "select_kernel", "unpack_signals"]
