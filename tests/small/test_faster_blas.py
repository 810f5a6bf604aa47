"""`SmallModel.load` opens the faster BLAS before MLX is imported."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mlxroute.backend import blas
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or blas._is_cuda_build(),
    reason="MLX brings its own fast BLAS, or the dynamic linker keeps no log",
)

LOAD = """
import os
from pathlib import Path
from mlxroute import SmallModel
cache_dir = os.environ.get("TINY_CACHE")
small = SmallModel.load(
    os.environ["TINY"], cache_dir=Path(cache_dir) if cache_dir else None, notify=print
)
small.prefill(list(range(5, 25)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


def run(code: str, folder: Path, **variables: str) -> tuple[str, Path]:
    """Run code in a fresh process; return its output and the library MLX takes sgemm from."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        # The dynamic linker logs which library it takes each symbol from.
        env=os.environ
        | {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(folder / "log")}
        | {"XDG_CACHE_HOME": str(folder / "default")}
        | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    libraries = {
        Path(line.split(" to ")[1].split(" [")[0])
        for file in folder.glob("log.*")
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if "symbol `cblas_sgemm'" in line and "libmlx" in line.split(" to ")[0]
    }
    (library,) = libraries
    return result.stdout, library


def test_a_fresh_process_that_loads_a_model_uses_the_faster_blas(
    model: Path, tmp_path: Path
) -> None:
    output, library = run(LOAD, tmp_path, TINY=str(model))
    assert library.parent == tmp_path / "default" / "mlxroute" / "blas"
    assert output == f"BLAS: OpenBLAS ({library.name})\n"


def test_the_faster_blas_is_kept_in_the_cache_folder_given_to_load(
    model: Path, tmp_path: Path
) -> None:
    _, library = run(LOAD, tmp_path, TINY=str(model), TINY_CACHE=str(tmp_path / "given"))
    assert library.parent == tmp_path / "given" / "blas"
    assert not (tmp_path / "default").exists()


def test_a_process_that_imported_mlx_first_is_told_that_it_stays_slow(
    model: Path, tmp_path: Path
) -> None:
    output, library = run(f"import mlx.core{LOAD}", tmp_path, TINY=str(model))
    assert "MLX was imported first" in output
    assert "openblas" not in library.name
