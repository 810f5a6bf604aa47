"""Command-line options, worker processes and fixtures for the whole test suite."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from mlxroute.backend import blas
from mlxroute.large.http import retry
from mlxroute.large.negotiation import running_servers
from mlxroute.user_folders import cache_folder
from mlxroute.view.live_area import REWRAPPING_VARIABLES

# Read before a fixture hides the user's settings from the tests.
CACHE_DIR = Path(os.environ.get("MLXROUTE_CACHE_DIR") or cache_folder())
# Each worker holds the small model in memory, and all of them share one GPU.
MAX_WORKERS = 2
# No test depends on the speed of the machine.
settings.register_profile("mlxroute", deadline=None)
settings.load_profile("mlxroute")
_OPENAI_VARIABLES = ("OPENAI_API_KEY", "OPENAI_BASE_URL")
_TERMINAL_VARIABLES = ("TERM_PROGRAM", "FORCE_COLOR", "NO_COLOR", "COLUMNS", *REWRAPPING_VARIABLES)

# Workers, and commands that tests start, read compiled modules; they do not compile each again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Tests interrupt themselves; a job that a script starts in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
# OpenBLAS reads this when it is loaded. Its threads spin while they wait for each other, so that
# several of them are very slow where other processes use the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# MLX uses this BLAS only if it is loaded first; other conftest files import MLX.
blas.interpose(CACHE_DIR)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--heavy", action="store_true", help="also run the tests marked heavy")
    parser.addoption("--chaos-seed", type=int, help="repeat the faults of an earlier chaos run")


def pytest_configure(config: pytest.Config) -> None:
    """Keep MLX from compiling C++ for a CPU, except in heavy tests.

    It takes a second for each of some fifty pieces of code, and gives the same values.
    """
    if sys.platform == "linux" and not config.getoption("--heavy"):
        os.environ["MLX_DISABLE_COMPILE"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes run the tests; 0 means this process alone.

    Chosen files start sooner without workers, heavy tests need the machine for themselves, and
    workers cannot show output as it comes (`-s`).
    """
    whole_suite = config.args_source is not pytest.Config.ArgsSource.ARGS
    if not whole_suite or config.getoption("--heavy") or config.getoption("capture") == "no":
        return 0
    return min(MAX_WORKERS, os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave heavy tests out unless asked for, and start the longest files first."""
    if not config.getoption("--heavy"):
        heavy = [item for item in items if item.get_closest_marker("heavy")]
        config.hook.pytest_deselected(items=heavy)
        items[:] = [item for item in items if item not in heavy]
    # A long file that a worker starts last would keep the others waiting.
    items.sort(key=lambda item: item.path.parent.name != "real")


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out all that stays to the end: modules and tests."""
    gc.freeze()
    # Tests make many objects that die at once.
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def short_retry_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries of a failed call follow after milliseconds."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield paths that do not exist yet, far faster than a `tmp_path` for each test."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, _homes: Iterator[Path]) -> None:
    """No test uses the user's own settings, keys, history, verdicts or servers."""
    monkeypatch.setattr(running_servers, "DEFAULT_PORTS", {})
    for name in list(os.environ):
        if name in (*_OPENAI_VARIABLES, *_TERMINAL_VARIABLES) or name.startswith("MLXROUTE_"):
            monkeypatch.delenv(name)
    home = next(_homes)
    (home / "cache").mkdir(parents=True)
    (home / "config.toml").touch()
    monkeypatch.setenv("MLXROUTE_CONFIG", str(home / "config.toml"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    (home / "cache" / "blas").symlink_to(CACHE_DIR / "blas")
    monkeypatch.setenv("MLXROUTE_CACHE_DIR", str(home / "cache"))
