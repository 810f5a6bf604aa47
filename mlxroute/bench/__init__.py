"""Benchmarks of speed, kernels, latency and quality, each with baselines of the same run."""
