"""Options and fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from mlxroute.backend import blas
from mlxroute.weights import default_cache_dir

# Read before a fixture hides the user's settings from the tests.
CACHE_DIR = Path(os.environ.get("MLXROUTE_CACHE_DIR") or default_cache_dir())
# No test depends on the speed of the machine.
settings.register_profile("mlxroute", deadline=None)
settings.load_profile("mlxroute")
_OWN_VARIABLES = ("OPENAI_API_KEY", "OPENAI_BASE_URL")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="also run the tests marked heavy")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports MLX, as the command line does.
    blas.interpose(CACHE_DIR)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--heavy"):
        return
    heavy = [item for item in items if item.get_closest_marker("heavy")]
    if heavy:
        config.hook.pytest_deselected(items=heavy)
        items[:] = [item for item in items if item not in heavy]


@pytest.fixture(autouse=True)
def _own_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test reads or writes the user's own settings, keys, history or verdicts."""
    for name in list(os.environ):
        if name in _OWN_VARIABLES or name.startswith("MLXROUTE_"):
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MLXROUTE_CONFIG", str(home / "config.toml"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    (home / "cache").mkdir()
    (home / "cache" / "blas").symlink_to(CACHE_DIR / "blas")
    monkeypatch.setenv("MLXROUTE_CACHE_DIR", str(home / "cache"))
