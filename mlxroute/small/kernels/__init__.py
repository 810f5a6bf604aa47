"""The logit kernel: everything the router needs, from one row of logits, in one packed row."""

from mlxroute.small.kernels.graph import TOP_K, pack_signals, unpack_signals

__all__ = ["TOP_K", "pack_signals", "unpack_signals"]
