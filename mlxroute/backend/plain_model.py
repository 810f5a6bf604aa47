"""Loading of plain models, such as those converted from GGUF files, without `mlx_lm.utils`.

That module imports transformers, which takes a second.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from mlxroute.backend.mlx_lm_package import defer_mlx_lm_init

# The architectures that the conversion of GGUF files writes.
_ARCHITECTURES = ("llama", "qwen2")
# Keys of config.json that ask for more than the weights as they are.
_SPECIAL_KEYS = frozenset(
    ("model_file", "quantization", "quantization_config", "quantize_activations", "text_config")
)


def is_plain(path: Path, config: Mapping[str, Any]) -> bool:
    """Return whether `load_plain_model` can load a model, given its configuration."""
    return (
        config["model_type"] in _ARCHITECTURES
        and not config.keys() & _SPECIAL_KEYS
        and not (path / "hf_quant_config.json").exists()
    )


def plain_architecture(config: Mapping[str, Any]) -> ModuleType:
    """Return the module of `mlx_lm` for a plain model."""
    defer_mlx_lm_init()
    return importlib.import_module(f"mlx_lm.models.{config['model_type']}")


def load_plain_model(path: Path, config: dict[str, Any]) -> Any:
    """Return the `mlx_lm` model of a directory, with weights that are not read yet.

    The same steps as `mlx_lm.utils.load_model` takes for such a model.
    """
    architecture = plain_architecture(config)
    import mlx.core as mx

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
