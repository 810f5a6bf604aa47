"""Real weights in the user's own cache: fetched when they are not there yet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from mlxroute.hosting.launcher import LocalServer
from mlxroute.small import SmallModel
from tests.conftest import CACHE_DIR

# Of the spread of a matrix: enough to disagree often, too little to talk nonsense.
_NOISE = 0.07
PROMPTS = [
    json.loads(line)["prompt"]
    for line in (Path(__file__).parents[2] / "bench" / "prompts" / "varied.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


@pytest.fixture(scope="session")
def load_small() -> Callable[[str], SmallModel]:
    """Load a catalogue model once a session."""
    loaded: dict[str, SmallModel] = {}

    def load(name: str) -> SmallModel:
        if name not in loaded:
            loaded[name] = SmallModel.load(name, cache_dir=CACHE_DIR)
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def smollm2(load_small: Callable[[str], SmallModel]) -> SmallModel:
    """SmolLM2-135M, the smallest real model of the catalogue."""
    return load_small("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_path(smollm2: SmallModel) -> Path:
    return CACHE_DIR / "models" / smollm2.name


@contextmanager
def serving(path: Path, log_path: Path) -> Iterator[LocalServer]:
    """A real mlx_lm.server for the model at `path`."""
    with LocalServer.launch(path, cache_dir=CACHE_DIR, log_path=log_path) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def host(smollm2_path: Path, tmp_path: Path) -> Iterator[LocalServer]:
    """A real mlx_lm.server with SmolLM2-135M, for one test."""
    with serving(smollm2_path, tmp_path / "host.log") as server:
        yield server


@pytest.fixture(scope="session")
def stranger_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary: SmolLM2-135M with noise on its matrices."""
    folder = tmp_path_factory.mktemp("stranger") / "stranger"
    shutil.copytree(smollm2_path, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.random.seed(0)
    for name, value in sorted(weights.items()):
        if value.ndim == 2:
            noise = mx.random.normal(value.shape) * mx.std(value.astype(mx.float32))
            weights[name] = (value + _NOISE * noise).astype(value.dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


@pytest.fixture
def stranger(stranger_path: Path, tmp_path: Path) -> Iterator[LocalServer]:
    """A real mlx_lm.server with a model that often disagrees with SmolLM2-135M."""
    with serving(stranger_path, tmp_path / "host.log") as server:
        yield server
