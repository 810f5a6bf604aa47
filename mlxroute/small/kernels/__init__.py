"""The logit kernel: everything the router needs, from one row of logits, in one packed row."""

from mlxroute.small.kernels.packed_row import unpack_signals
from mlxroute.small.kernels.selection import NAMES, Kernel, select_kernel

__all__ = ["NAMES", "Kernel", "select_kernel", "unpack_signals"]
