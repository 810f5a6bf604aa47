"""Models loaded without transformers: the same as by mlx_lm, and only where they can be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxroute.backend.load import load, on_cpu
from mlxroute.backend.model_config import read_config
from mlxroute.backend.plain_model import is_plain, load_plain_model
from mlxroute.small import SmallModel
from mlxroute.tokenizers.fast_tokenizer import FastTokenizer
from tests.support.tiny import make_tiny_model


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_is_the_one_that_mlx_lm_loads(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    from mlx_lm.utils import load_model

    path = make_tiny_model(tmp_path / "m", model_type=model_type, tied=tied)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    config = read_config(path)
    assert is_plain(path, config)
    expected, expected_config = load_model(path)
    assert config == expected_config
    model = load_plain_model(path, config)
    assert type(model) is type(expected)
    weights = [dict(tree_flatten(m.parameters())) for m in (model, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert all(mx.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    ids = mx.array([[1, 5, 9]])
    loaded, tokenizer = load(path)
    assert isinstance(tokenizer, FastTokenizer)
    assert mx.array_equal(loaded(ids), expected(ids))


@pytest.mark.skipif(not on_cpu(), reason="Metal and CUDA run half-precision weights as they are")
@pytest.mark.parametrize("tied", [True, False])
def test_half_precision_weights_give_the_numbers_of_wide_ones(tmp_path: Path, tied: bool) -> None:
    path = make_tiny_model(tmp_path / "m", model_type="qwen2", tied=tied)
    file = str(path / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(file))
    narrow = {name: value.astype(mx.float16) for name, value in weights.items()}
    mx.eval(narrow)
    mx.save_safetensors(file, narrow, {"format": "mlx"})
    config = read_config(path)
    assert is_plain(path, config)
    wide = load_plain_model(path, config)
    wide.load_weights([(name, value.astype(mx.float32)) for name, value in narrow.items()])
    model, _ = load(path)
    for ids in (mx.array([[1, 5, 9, 300]]), mx.array([[7]]), mx.array([[1, 2], [3, 4]])):
        logits = model(ids)
        assert logits.dtype == mx.float32
        assert mx.array_equal(logits, wide(ids))
    dtypes = {name: value.dtype for name, value in tree_flatten(model.parameters())}
    kept = set() if tied else {"model.embed_tokens.weight"}
    assert {name for name, dtype in dtypes.items() if dtype != mx.float32} == kept
    matrices = {name: value for name, value in tree_flatten(model.parameters()) if value.ndim == 2}
    layouts = {name: np.array(value, copy=False).strides for name, value in matrices.items()}
    by_rows = {name for name, (row, column) in layouts.items() if row > column}
    assert by_rows == kept, "OpenBLAS multiplies matrices by columns faster"


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma3_text"},
        {"quantization": {"group_size": 32, "bits": 4}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"model_file": "model.py"},
        {"text_config": {}},
    ],
)
def test_other_models_are_left_to_mlx_lm(tmp_path: Path, change: dict[str, Any]) -> None:
    path = make_tiny_model(tmp_path / "m")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert not is_plain(path, read_config(path))


def test_the_public_tokenizer_is_that_of_mlx_lm(tmp_path: Path) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    model, tokenizer = load(make_tiny_model(tmp_path / "m"))
    small = SmallModel(model, tokenizer, name="m")
    before = small.encode_conversation([{"role": "user", "content": "hi"}]).text
    assert isinstance(small.tokenizer, TokenizerWrapper)
    assert small.tokenizer is small.tokenizer
    assert small.tokenizer.eos_token_ids == small.vocabulary.eos_ids
    assert small.encode_conversation([{"role": "user", "content": "hi"}]).text == before


def run_python(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_an_answer_of_a_plain_model_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    script = (
        "import sys\n"
        "from mlxroute.cli import main\n"
        "main(['ask', '--offline', '--max-tokens', '2', '--small', sys.argv[1], 'hi'])\n"
        "names = ('transformers', 'huggingface_hub', 'requests', 'numpy', 'gguf')\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert run_python(script, str(path)) == "[]"


def test_mlx_lm_is_complete_when_it_is_used_after_a_plain_model() -> None:
    script = (
        "import sys\n"
        "from mlxroute.backend.mlx_lm_package import defer_mlx_lm_init\n"
        "defer_mlx_lm_init()\n"
        "import mlx_lm.models.llama\n"
        "light = 'transformers' not in sys.modules\n"
        "import mlx_lm\n"
        "from mlx_lm import stream_generate\n"
        "from mlx_lm.generate import stream_generate as same\n"
        "defer_mlx_lm_init()\n"
        "print(light, stream_generate is same, mlx_lm.__version__ != '', mlx_lm.load is not None)"
    )
    assert run_python(script) == "True True True True"
