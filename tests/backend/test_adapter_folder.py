"""Folders of LoRA weights: names of adapted models, and the questions they were trained with."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlxroute.backend.adapter_folder import adapted_name, read_trained_questions
from mlxroute.cli import main
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import read_questions
from mlxroute.small import SmallModel
from tests.support.tiny import make_tiny_model


def make_adapter(folder: Path, *, scale: float = 3.0) -> Path:
    """Write an adapter of a tiny model's last layer."""
    folder.mkdir()
    parameters = {"rank": 2, "scale": scale, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.1.self_attn.q_proj"
    arrays = {f"{name}.lora_a": mx.ones((64, 2)), f"{name}.lora_b": mx.ones((2, 64))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    return folder


def test_an_adapted_model_has_a_name_of_its_own(tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "a")
    copy = make_adapter(tmp_path / "b")
    other = make_adapter(tmp_path / "c", scale=4.0)
    assert adapted_name("s", None) == "s"
    assert adapted_name("s", first) == adapted_name("s", copy) != adapted_name("s", other)
    model = make_tiny_model(tmp_path / "tiny")
    small = SmallModel.load(model, adapter=first)
    assert (small.name, small.plain_name) == (adapted_name(str(model), first), str(model))
    plain = SmallModel.load(model)
    assert (plain.name, plain.plain_name) == (str(model), str(model))


def test_a_missing_adapter_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere has no readable adapter_config\.json"):
        adapted_name("s", tmp_path / "nowhere")


def test_bench_quality_refuses_questions_that_the_adapter_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(f'{{"prompt": "say {i}", "answer": "{i}"}}\n' for i in range(3)))
    adapter = make_adapter(tmp_path / "a")
    provenance = {"questions": [read_questions(data)[1].fingerprint]}
    (adapter / "provenance.json").write_text(json.dumps(provenance))
    arguments = ["--large", "http://127.0.0.1:9/v1", "--adapter", str(adapter)]
    assert main(["bench", "quality", "--data", str(data), *arguments]) == 2
    assert "trained with 1 of these 3 questions" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"questions": 3}'])
def test_a_file_that_is_no_provenance_is_refused(text: str, tmp_path: Path) -> None:
    assert read_trained_questions(tmp_path) == frozenset()
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(UsageError, match="provenance"):
        read_trained_questions(tmp_path)


def test_every_command_with_a_small_model_takes_an_adapter() -> None:
    from mlxroute.config.settings import declared_settings

    settings = declared_settings()
    assert set(settings["small"].commands) == set(settings["adapter"].commands)
