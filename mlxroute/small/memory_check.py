"""The check that a small model fits in free memory, before it is fetched."""

from __future__ import annotations

from pathlib import Path

from mlxroute.backend import blas, memory
from mlxroute.weights import CheckSize, WeightsSize


def make_size_check(cache_dir: Path) -> CheckSize:
    """Return a check that raises NotEnoughSpace for weights that do not fit on this device."""

    def check_size(size: WeightsSize) -> None:
        # It asks MLX for its device, and MLX must be imported after the BLAS is open.
        blas.interpose(cache_dir)
        from mlxroute.backend.load import OVERHEAD_BYTES, on_cpu, require_memory

        weights = size.float32_bytes if on_cpu() else size.stored_bytes
        needed, available = weights + OVERHEAD_BYTES, memory.available_bytes()
        require_memory(needed, available, name=size.name, role="small")

    return check_size
