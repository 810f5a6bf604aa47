"""Fixtures with real weights, which are downloaded to the user's own cache on first use."""

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

# In standard deviations of a matrix: the models often disagree, and both write sentences.
_NOISE = 0.07
PROMPTS = [
    json.loads(line)["prompt"]
    for line in (Path(__file__).parents[2] / "bench" / "prompts" / "varied.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


@pytest.fixture(scope="session")
def load_small() -> Callable[[str], SmallModel]:
    """Return a function that loads a model of the catalogue, once a session."""
    models: dict[str, SmallModel] = {}

    def load(name: str) -> SmallModel:
        if name not in models:
            models[name] = SmallModel.load(name, cache_dir=CACHE_DIR)
        return models[name]

    return load


@pytest.fixture(scope="session")
def smollm2(load_small: Callable[[str], SmallModel]) -> SmallModel:
    """SmolLM2-135M, the smallest model of the catalogue."""
    return load_small("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_path(smollm2: SmallModel) -> Path:
    """The folder of SmolLM2-135M."""
    return CACHE_DIR / "models" / smollm2.name


@contextmanager
def serve(path: Path, log_path: Path) -> Iterator[LocalServer]:
    """Run a real mlx_lm.server with the model at `path`."""
    with LocalServer.launch(path, cache_dir=CACHE_DIR, log_path=log_path) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def host(smollm2_path: Path, tmp_path: Path) -> Iterator[LocalServer]:
    """A real mlx_lm.server with SmolLM2-135M, for one test."""
    with serve(smollm2_path, tmp_path / "host.log") as server:
        yield server


@pytest.fixture(scope="session")
def noisy_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another model with the same vocabulary: SmolLM2-135M with added noise."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
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
def noisy_host(noisy_path: Path, tmp_path: Path) -> Iterator[LocalServer]:
    """A real mlx_lm.server with a model that often disagrees with SmolLM2-135M."""
    with serve(noisy_path, tmp_path / "host.log") as server:
        yield server
