"""The logit kernel: everything the router needs, from one row of logits, in one packed row."""

from mlxroute.small.kernels.graph import pack_signals
from mlxroute.small.kernels.row import unpack

__all__ = ["pack_signals", "unpack"]
