"""A model that one thread has loaded writes answers in the thread of the scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.serving import AnswerScheduler
from mlxroute.small import SmallModel
from tests.serving.conftest import PROMPTS, alone, request, written
from tests.support.tiny import make_tiny_model

# Each of them makes the model compute its frequencies when it is built.
_SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("scaling", _SCALED.values(), ids=_SCALED)
def test_a_model_with_scaled_positions_is_served(
    tmp_path: Path, model_type: str, scaling: dict[str, Any]
) -> None:
    extra = {"head_dim": 16, "rope_scaling": scaling}
    path = make_tiny_model(tmp_path / "tiny", model_type=model_type, extra=extra)
    small = SmallModel(*load(path), name="tiny")
    with AnswerScheduler(small, None) as scheduler:
        served = written(scheduler.submit(request(PROMPTS[0])))
    assert served == alone(small, PROMPTS[0])
