"""MLX on this machine: its BLAS, free memory, and loading models for its device."""
