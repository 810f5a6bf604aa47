"""The tensors of a GGUF file under their names in `mlx_lm`, with their shapes checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxroute.errors import WeightsError
from mlxroute.weights.gguf_config import ROPE_FACTORS, require_known_type
from mlxroute.weights.gguf_file import GgufFile, GgufTensor

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A tensor to write under a new name.

    Args:
        name: Its name in `mlx_lm`.
        shape: Its shape.
        source: The tensor of the file; None for zeros, where only other biases are in the file.
        heads: Number of attention heads whose rows llama files interleave; None for others.
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor | None
    heads: int | None

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return int(np.prod(self.shape, dtype=object))


def plan_conversions(gguf: GgufFile, config: Mapping[str, Any]) -> list[Conversion]:
    """Return the tensors of the model that a config.json describes, in the order of the file.

    Raises WeightsError if one is missing, has another shape or a type that cannot be converted, or
    does not belong to such a model.
    """
    missing = {tensor.name: tensor for tensor in _expected(gguf, config)}
    planned = []
    for name, tensor in gguf.tensors.items():
        if name == ROPE_FACTORS:  # They are part of the config.
            continue
        if name not in missing:
            raise WeightsError(
                f"{gguf.path}: tensor {name} does not belong to a plain {gguf.architecture} model"
            )
        expected = missing.pop(name)
        if tensor.shape != expected.shape:
            raise WeightsError(
                f"{gguf.path}: tensor {name} has shape {tensor.shape}, but the metadata gives"
                f" {expected.shape}; the file is damaged or was converted wrongly"
            )
        require_known_type(gguf, tensor)
        planned.append(Conversion(expected.new_name, tensor.shape, tensor, expected.heads))
    for tensor_name, absent in missing.items():
        if not absent.is_optional:
            raise WeightsError(f"{gguf.path} has no tensor {tensor_name}")
        planned.append(Conversion(absent.new_name, absent.shape, None, None))
    return planned


def read_rows(gguf: GgufFile, conversion: Conversion) -> Bytes:
    """Return the rows of a tensor in MLX's order, quantised as in the file, uint8 [rows, bytes].

    Llama files interleave the two halves of rotary pairs. The row of a bias is one element.
    """
    assert conversion.source is not None
    rows = gguf.rows(conversion.source)
    if conversion.heads is None:
        return rows
    if len(conversion.shape) == 1:
        rows = rows.reshape(conversion.elements, -1)
    return _unpermute(rows, conversion.heads)


def _unpermute(rows: Bytes, heads: int) -> Bytes:
    """Return the rows in MLX's order: llama GGUF files interleave the halves of rotary pairs."""
    order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows[order]


@dataclass(frozen=True, slots=True)
class _Expected:
    """A tensor that a model has: its name in the file and in `mlx_lm`, and its shape."""

    name: str
    new_name: str
    shape: tuple[int, ...]
    heads: int | None = None
    is_optional: bool = False


def _expected(gguf: GgufFile, config: Mapping[str, Any]) -> Iterator[_Expected]:
    """Yield the tensors of a model; optional are biases whose absence is the same as zeros."""
    hidden, rows = config["hidden_size"], config["vocab_size"]
    yield _Expected("token_embd.weight", "model.embed_tokens.weight", (rows, hidden))
    yield _Expected("output_norm.weight", "model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield _Expected("output.weight", "lm_head.weight", (rows, hidden))
    layer = list(_expected_in_layer(gguf.architecture, config))
    for index in range(config["num_hidden_layers"]):
        for item in layer:
            yield _Expected(
                f"blk.{index}.{item.name}",
                f"model.layers.{index}.{item.new_name}",
                item.shape,
                item.heads,
                item.is_optional,
            )


def _expected_in_layer(architecture: str, config: Mapping[str, Any]) -> Iterator[_Expected]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", hidden // heads)
    is_llama = architecture == "llama"
    attention_bias = config.get("attention_bias", not is_llama)
    mlp_bias = config.get("mlp_bias", False)
    yield _Expected("attn_norm.weight", "input_layernorm.weight", (hidden,))
    yield _Expected("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,))
    matrices = (
        ("attn_q", "self_attn.q_proj", heads * size, hidden, attention_bias),
        ("attn_k", "self_attn.k_proj", groups * size, hidden, attention_bias),
        ("attn_v", "self_attn.v_proj", groups * size, hidden, attention_bias),
        ("attn_output", "self_attn.o_proj", hidden, heads * size, attention_bias and is_llama),
        ("ffn_gate", "mlp.gate_proj", inner, hidden, mlp_bias),
        ("ffn_up", "mlp.up_proj", inner, hidden, mlp_bias),
        ("ffn_down", "mlp.down_proj", hidden, inner, mlp_bias),
    )
    interleaved = {"attn_q": heads, "attn_k": groups} if is_llama else {}
    for name, new_name, outputs, inputs, has_bias in matrices:
        order = interleaved.get(name)
        yield _Expected(f"{name}.weight", f"{new_name}.weight", (outputs, inputs), order)
        if has_bias:
            yield _Expected(f"{name}.bias", f"{new_name}.bias", (outputs,), order, True)
