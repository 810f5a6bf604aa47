"""Endpoints of real models, for real clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.clients.endpoint_process import run_server


@pytest.fixture(scope="package")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SmolLM2-135M, which asks another process with the same model."""
    folder = tmp_path_factory.mktemp("endpoint")
    with (
        run_server(folder, "host", "smollm2-135m") as large,
        run_server(
            folder,
            "serve",
            *("--small", "smollm2-135m", "--large", large, "--budget", "20%"),
            *("--tools", "large", "--port", "0"),
        ) as address,
    ):
        yield address


@pytest.fixture(scope="package")
def local_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SmolLM2-135M alone, which refuses tools."""
    folder = tmp_path_factory.mktemp("local-endpoint")
    flags = ("--small", "smollm2-135m", "--offline", "--port", "0")
    with run_server(folder, "serve", *flags) as address:
        yield address


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder for a client."""
    path = tmp_path / "client-home"
    path.mkdir()
    return path
