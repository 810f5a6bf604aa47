"""MLX on this machine: which device, which BLAS, how much memory, and loading weights to suit."""
