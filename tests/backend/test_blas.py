"""The line about the BLAS in use: why the faster one could not be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlxroute.backend import blas


@pytest.fixture(autouse=True)
def _linux_without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(blas, "_is_cuda_build", lambda: False)
    monkeypatch.setattr(blas, "_system_openblas", lambda _: Path("/no/libopenblas.so"))
    monkeypatch.setattr(blas, "_distribution_file", lambda *names: Path("/".join(("", *names))))
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.0")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)


def test_a_cache_folder_that_is_a_file_is_named_in_words(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    line = blas._interpose(file)
    assert f"which is slow ({file / 'blas'}: Not a directory)" in line


def test_machines_that_share_a_cache_have_a_copy_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(command: list[str | Path], **_: object) -> None:
        Path(command[4]).touch()

    monkeypatch.setattr(subprocess, "run", copy)
    copies = []
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        copies.append(blas._unprefixed_openblas(tmp_path))
    assert sorted((tmp_path / "blas").iterdir()) == sorted(set(copies))
    assert len(set(copies)) == 2


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            subprocess.CalledProcessError(1, [Path("/patchelf")]),
            "patchelf failed with exit status 1",
        ),
        (
            subprocess.TimeoutExpired([Path("/patchelf")], 60),
            "patchelf did not end within 60 seconds",
        ),
    ],
)
def test_a_copy_that_cannot_be_made_is_explained_without_its_command_line(
    failure: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    assert f"which is slow ({words})" in blas._interpose(tmp_path)
