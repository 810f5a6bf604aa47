"""Conversion of GGUF files to MLX model directories: float16 weights and JSON files.

Tensors are converted in slabs, so that memory stays bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from mlxroute.errors import WeightsError
from mlxroute.types import Progress
from mlxroute.weights.gguf_file import GgufFile, GgufTensor
from mlxroute.weights.gguf_tokenizer import TokenizerFiles

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SLAB_ELEMENTS = 1 << 20
"""Elements that are converted at a time."""

# `dequantize` works on 16 rows at a time; rows of at most this many elements fit the CPU's cache.
_ROW_ELEMENTS = 1 << 14

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Conversion:
    """A tensor to write under a new name.

    `heads` is the number of attention heads whose rows llama files interleave; None for others.
    """

    name: str
    source: GgufTensor
    heads: int | None


def converted_bytes(gguf: GgufFile) -> int:
    """Return the size of the file's tensors as float16."""
    return sum(2 * tensor.elements for tensor in gguf.tensors.values())


def build_config(gguf: GgufFile, tokenizer: TokenizerFiles) -> dict[str, Any]:
    """Return the contents of config.json for a `llama` or `qwen2` file.

    Raises WeightsError for other architectures and for what cannot be converted exactly.
    """
    if gguf.architecture not in ("llama", "qwen2"):
        raise WeightsError(
            f"{gguf.path}: GGUF architecture {gguf.architecture!r} is not supported, only llama "
            "and qwen2 are; use a model directory or a hub id instead"
        )
    if gguf.metadata.get("split.count", 1) > 1:
        raise WeightsError(f"{gguf.path} is one part of a split GGUF: merge its parts first")
    heads = _positive_integer(gguf, "attention.head_count")
    hidden = _positive_integer(gguf, "embedding_length")
    config: dict[str, Any] = {
        "architectures": [
            "LlamaForCausalLM" if gguf.architecture == "llama" else "Qwen2ForCausalLM"
        ],
        "model_type": gguf.architecture,
        "hidden_size": hidden,
        "intermediate_size": _positive_integer(gguf, "feed_forward_length"),
        "num_hidden_layers": _positive_integer(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _positive_integer(gguf, "attention.head_count_kv", default=heads),
        "max_position_embeddings": _positive_integer(gguf, "context_length"),
        "rms_norm_eps": _short_float(gguf.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _short_float(gguf.get("rope.freq_base", 10000.0)),
        "vocab_size": _tensor(gguf, "token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
    }
    head_dim = _positive_integer(gguf, "attention.key_length", default=hidden // heads)
    if gguf.architecture == "llama":
        config["head_dim"] = head_dim
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors
    scaling = _rope_scaling(gguf, theta=config["rope_theta"], head_dim=head_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if gguf.get("rope.dimension_count", head_dim) != head_dim:
        raise WeightsError(f"{gguf.path}: rotary embedding over part of a head is not supported")
    return config


def write_model(
    gguf: GgufFile, folder: Path, *, tokenizer: TokenizerFiles, label: str, progress: Progress
) -> dict[str, str]:
    """Write a model directory into `folder` and return the SHA-256 of its weights file, by name.

    Raises WeightsError for a model that cannot be converted exactly.
    """
    config = build_config(gguf, tokenizer)
    conversions = _plan_conversions(gguf, config)
    weights = "model.safetensors"
    digest = _write_safetensors(conversions, gguf, folder / weights, label, progress)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    for file, table in {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer.tokenizer,
        "tokenizer_config.json": tokenizer.config,
    }.items():
        text = json.dumps(table, ensure_ascii=False, indent=None if file == "tokenizer.json" else 2)
        (folder / file).write_text(text + "\n", encoding="utf-8")
    return {weights: digest}


def _plan_conversions(gguf: GgufFile, config: dict[str, Any]) -> list[_Conversion]:
    # The RoPE factors become part of the config.
    return [
        _plan_conversion(tensor, gguf, config)
        for tensor in gguf.tensors.values()
        if tensor.name != _ROPE_FACTORS
    ]


def _plan_conversion(tensor: GgufTensor, gguf: GgufFile, config: dict[str, Any]) -> _Conversion:
    if tensor.name in _GLOBAL_NAMES:
        return _Conversion(_GLOBAL_NAMES[tensor.name], tensor, None)
    match tensor.name.split("."):
        case ["blk", layer, kind, ("weight" | "bias") as part] if kind in _LAYER_NAMES:
            heads = None
            if gguf.architecture == "llama" and kind in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
            return _Conversion(f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{part}", tensor, heads)
    raise WeightsError(
        f"{gguf.path}: tensor {tensor.name} does not belong to a plain {gguf.architecture} model"
    )


def _write_safetensors(
    conversions: list[_Conversion], gguf: GgufFile, path: Path, label: str, progress: Progress
) -> str:
    """Write the tensors one slab at a time, in the order given, and return the file's SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    total = 0
    for conversion in conversions:
        end = total + 2 * conversion.source.elements
        header[conversion.name] = {
            "dtype": "F16",
            "shape": list(conversion.source.shape),
            "data_offsets": [total, end],
        }
        total = end
    header_text = json.dumps(header, separators=(",", ":")).encode()
    header_text += b" " * (-len(header_text) % 8)
    digest = hashlib.sha256()
    done = 0
    with open(path, "wb") as file:
        for chunk in (len(header_text).to_bytes(8, "little"), header_text):
            file.write(chunk)
            digest.update(chunk)
        progress(label, 0, total)
        # No fsync: if power fails, the sizes in the manifest reveal a half-written file.
        for slab in _convert_slabs(conversions, gguf):
            file.write(slab)
            digest.update(slab)
            done += slab.nbytes
            progress(label, done, total)
    return digest.hexdigest()


def _convert_slabs(conversions: list[_Conversion], gguf: GgufFile) -> Iterator[memoryview]:
    """Yield the converted slabs of all tensors in order; several threads convert the next ones."""
    workers = min(os.cpu_count() or 1, 8)
    pending: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for conversion in conversions:
                tensor = conversion.source
                rows = gguf.rows(tensor)
                if conversion.heads is not None:
                    rows = _unpermute(rows, conversion.heads)
                step = max(1, SLAB_ELEMENTS // tensor.shape[-1])
                for start in range(0, len(rows), step):
                    if len(pending) > 2 * workers:
                        yield pending.popleft().result()
                    pending.append(pool.submit(_to_float16, rows[start : start + step], tensor))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _unpermute(rows: Bytes, heads: int) -> Bytes:
    """Return the rows in MLX's order: llama GGUF files interleave the halves of rotary pairs."""
    order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows[order]


def _to_float16(rows: Bytes, tensor: GgufTensor) -> memoryview:
    """Dequantise rows of blocks; raise WeightsError if a value does not fit float16."""
    block, size = GGML_QUANT_SIZES[tensor.kind]
    raw = np.ascontiguousarray(rows).reshape(-1)
    blocks = raw.size // size
    # Blocks are independent, so rows may have any length that divides the slab.
    blocks_per_row = next(
        n for n in range(max(1, _ROW_ELEMENTS // block), 0, -1) if blocks % n == 0
    )
    try:
        with np.errstate(over="raise", invalid="raise"):
            values = dequantize(raw.reshape(-1, blocks_per_row * size), tensor.kind)
            return memoryview(values.astype(np.float16).reshape(-1)).cast("B")
    except FloatingPointError as exc:
        raise WeightsError(f"tensor {tensor.name} holds values beyond float16") from exc
    except NotImplementedError as exc:
        raise WeightsError(
            f"tensor {tensor.name} has type {tensor.kind.name}, which is not supported"
        ) from exc


def _rope_scaling(gguf: GgufFile, *, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the `rope_scaling` table of config.json; None if the file scales nothing."""
    kind = gguf.get("rope.scaling.type", "none")
    if _ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf, theta=theta, head_dim=head_dim)
    if kind == "none":
        return None
    factor = gguf.get("rope.scaling.factor")
    if kind not in ("linear", "yarn") or factor is None:
        raise WeightsError(f"{gguf.path}: rope scaling {kind!r} is not supported")
    scaling = {"rope_type": kind, "factor": _short_float(factor)}
    original = gguf.get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(gguf: GgufFile, *, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the four settings of Llama 3's RoPE scaling from the factors that it produced.

    Llama 3 divides the frequencies of long wavelengths by `factor`, keeps those of short ones and
    interpolates between them. The file holds the divisors, `rope_freqs.weight` [head_dim / 2]; the
    settings other than `factor` are constants.
    """
    tensor = gguf.tensors[_ROPE_FACTORS]
    stored = dequantize(gguf.rows(tensor), tensor.kind).reshape(-1)
    factor, low, high, context = round(float(stored.max()), 3), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    if stored.shape != smooth.shape or not np.allclose(
        stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise WeightsError(f"{gguf.path}: its rope frequency factors are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _positive_integer(gguf: GgufFile, key: str, *, default: int | None = None) -> int:
    value = gguf.get(key, default)
    if not isinstance(value, int) or value <= 0:
        raise WeightsError(
            f"{gguf.path}: metadata {gguf.architecture}.{key} must be a positive integer, "
            f"not {value!r}"
        )
    return value


def _tensor(gguf: GgufFile, name: str) -> GgufTensor:
    if name not in gguf.tensors:
        raise WeightsError(f"{gguf.path} has no tensor {name}")
    return gguf.tensors[name]


def _short_float(value: float) -> float:
    """Return the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
