"""A model with random weights, small enough to show the cost of Python in a decode step."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_EOS = "<|im_end|>"


def write_random_model(path: Path) -> Path:
    """Write a model for `mlx_lm`: 4.2 million random weights and a tokenizer of single bytes.

    Returns `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    mx.random.seed(0)
    model, _ = load_model(path, lazy=True, strict=False)
    model.apply(lambda value: mx.random.normal(value.shape) * 0.1)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_EOS])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _EOS}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path
