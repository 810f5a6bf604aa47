"""The logit kernel: everything the router needs, from one row of logits, in one packed row."""

from mlxroute.small.kernels.choice import NAMES, Kernel, choose
from mlxroute.small.kernels.row import unpack

__all__ = ["NAMES", "Kernel", "choose", "unpack"]
