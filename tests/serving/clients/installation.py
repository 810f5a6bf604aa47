"""Installs clients from the package indexes, each in a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import CACHE_DIR

CLIENTS_DIR: Final = Path(os.environ.get("MLXROUTE_TEST_CLIENTS") or CACHE_DIR / "test-clients")
"""Where installed clients are kept; MLXROUTE_TEST_CLIENTS names another folder."""

PYTHON_CLIENTS: Final = {
    "openai": ("openai==3.57.0",),
    "llm": ("llm==0.36",),
    "langchain-openai": ("langchain-openai==1.7.4",),
    # `lm-eval` reads tokenizers with transformers.
    "lm-eval": ("lm-eval[api]==0.4.13", "transformers==5.24.0"),
    "aider-chat": ("aider-chat==0.86.2",),
}
NODE_CLIENTS: Final = {
    "openai": "openai@6.49.0",
    "continue": "@continuedev/cli@1.5.47",
}
_INSTALL_TIMEOUT_S: Final = 900
_RUN_TIMEOUT_S: Final = 900


def python_client(name: str, program: str = "python") -> Path:
    """Return the path of a program of a Python client's environment, after installing it."""
    folder = CLIENTS_DIR / f"python-{name}"
    requirements = PYTHON_CLIENTS[name]
    if not _is_current(folder, " ".join(requirements)):
        _run_install([sys.executable, "-m", "venv", str(folder)])
        pip = str(folder / "bin" / "python")
        _run_install([pip, "-m", "pip", "install", "--quiet", *requirements])
        _mark_current(folder, " ".join(requirements))
    return folder / "bin" / program


def node_client(name: str) -> Path:
    """Return the folder that has a client for Node in `node_modules`, after installing it."""
    folder = CLIENTS_DIR / f"node-{name}"
    if not _is_current(folder, NODE_CLIENTS[name]):
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        npm = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)]
        _run_install([*npm, NODE_CLIENTS[name]])
        _mark_current(folder, NODE_CLIENTS[name])
    return folder


def run_client(
    command: Sequence[object], home: Path, *, cwd: Path | None = None, **variables: str
) -> str:
    """Run a client in an environment without the user's settings; return its output.

    Fails the test, with all that the client has written, if its exit code is not 0.
    """
    home.mkdir(exist_ok=True)
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd or home,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_RUN_TIMEOUT_S,
        check=False,
    )
    if result.returncode != 0:
        pytest.fail(f"{command[0]} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def _is_current(folder: Path, requirement: str) -> bool:
    """Return whether a folder has what is required; an unfinished or old one is removed."""
    mark = folder / "installed.txt"
    if mark.is_file() and mark.read_text(encoding="utf-8") == requirement:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _mark_current(folder: Path, requirement: str) -> None:
    (folder / "installed.txt").write_text(requirement, encoding="utf-8")


def _run_install(command: list[str]) -> None:
    """Run a command of an installation. Fails the test if it cannot be completed."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        pytest.fail(f"the client cannot be installed: {exc}")
    if result.returncode != 0:
        last = "\n".join(result.stderr.strip().splitlines()[-5:])
        pytest.fail(f"the client cannot be installed: {' '.join(command)}\n{last}")
