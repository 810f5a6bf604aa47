"""The logit kernel: everything the router needs, from one row of logits, in one packed row."""

from mlxroute.small.kernels.packed_row import unpack
from mlxroute.small.kernels.selection import NAMES, Kernel, choose

__all__ = ["NAMES", "Kernel", "choose", "unpack"]
