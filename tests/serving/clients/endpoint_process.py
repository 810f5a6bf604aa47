"""Servers of this package in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.error import HTTPError, URLError

from tests.conftest import CACHE_DIR

_READY_TIMEOUT_S: Final = 300


@contextmanager
def run_server(folder: Path, command: str, *arguments: str) -> Iterator[str]:
    """Run `mlxroute host` or `mlxroute serve`; yield its address once it is ready."""
    config = folder / "config.toml"
    config.touch()
    env = {**os.environ, "MLXROUTE_CONFIG": str(config), "OPENBLAS_NUM_THREADS": "1"}
    common = ["--cache-dir", str(CACHE_DIR), "--skip-memory-check"]
    log_path = folder / f"{command}.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "mlxroute", command, *arguments, *common],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=env,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            # `host` prints it once it is ready.
            address = process.stdout.readline().strip()
            assert address, log_path.read_text(encoding="utf-8")
            if command == "serve":
                _wait_until_ready(process, address.removesuffix("/v1") + "/health", log_path)
            yield address
        finally:
            process.terminate()


def _wait_until_ready(process: subprocess.Popen[str], health: str, log_path: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < end_s:
        assert process.poll() is None, log_path.read_text(encoding="utf-8")
        try:
            direct.open(health, timeout=10).close()
        except HTTPError as exc:
            if exc.code != 503:
                raise
        except URLError:
            # It has ended, and its log says why.
            process.wait(timeout=10)
        else:
            return
        time.sleep(0.2)
    raise TimeoutError(f"{health} has no status 200")
