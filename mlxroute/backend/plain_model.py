"""Loading of plain models, such as those converted from GGUF files, without `mlx_lm.utils`.

That module imports transformers, which takes a second.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, cast

from mlxroute.backend.mlx_lm_package import defer_mlx_lm_init

# The architectures that the conversion of GGUF files writes.
_ARCHITECTURES = ("llama", "qwen2")
# Keys of config.json that ask for more than the weights as they are.
_SPECIAL_KEYS = frozenset(
    ("model_file", "quantization", "quantization_config", "quantize_activations", "text_config")
)


def read_plain_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration of a model that `load_plain_model` can load, as `mlx_lm` reads it.

    None for any other model, or if its files cannot be read.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] not in _ARCHITECTURES or config.keys() & _SPECIAL_KEYS:
            return None
        generation = path / "generation_config.json"
        if generation.exists():
            settings = json.loads(generation.read_text(encoding="utf-8"))
            if eos_token_id := settings.get("eos_token_id"):
                config["eos_token_id"] = eos_token_id
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if (path / "hf_quant_config.json").exists():
        return None
    return dict(config)


def load_plain_model(path: Path, config: dict[str, Any]) -> Any:
    """Return the `mlx_lm` model of a directory, with weights that are not read yet.

    The same steps as `mlx_lm.utils.load_model` takes for such a model.
    """
    defer_mlx_lm_init()
    import mlx.core as mx

    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    weights: dict[str, Any] = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights.update(cast(dict[str, Any], mx.load(str(file))))
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.eval()
    model.load_weights(list(weights.items()), strict=True)
    return model


def keep_embedding_narrow(model: Any) -> frozenset[str]:
    """Make the input embedding widen what it looks up; return the weights to leave as they are.

    Widening a looked-up row gives the same numbers as looking up a widened row, and spares the
    largest matrix of a small model: in Qwen2.5-Coder-0.5B a fifth of the weights. An embedding that
    is also the output layer is multiplied whole, and stays out.
    """
    import mlx.core as mx
    import mlx.nn as nn

    class WideningEmbedding(nn.Embedding):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            rows: mx.array = self["weight"][ids]
            return rows.astype(mx.float32)

    embedding = model.model.embed_tokens
    if model.args.tie_word_embeddings or type(embedding) is not nn.Embedding:
        return frozenset()
    embedding.__class__ = WideningEmbedding
    return frozenset(["model.embed_tokens.weight"])
