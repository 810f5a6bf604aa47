"""GGUF to an MLX model directory: float16 safetensors and config.json, in bounded memory."""

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
from mlxroute.weights.gguf_tokenizer import Tokenizer

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SLAB_ELEMENTS = 1 << 20
# `dequantize` works on 16 rows at a time; rows of this many elements keep that in the CPU's cache.
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
class _Plan:
    """One tensor to write: its name in the output, and the heads its rows are permuted by."""

    name: str
    source: GgufTensor
    heads: int | None


def converted_bytes(gguf: GgufFile) -> int:
    """Disk space of the float16 weights."""
    return sum(2 * tensor.elements for tensor in gguf.tensors.values())


def build_config(gguf: GgufFile, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of a `llama` or `qwen2` GGUF file; WeightsError for anything else."""
    if gguf.architecture not in ("llama", "qwen2"):
        raise WeightsError(
            f"{gguf.path}: GGUF architecture {gguf.architecture!r} is not supported, only llama "
            "and qwen2; use a model directory or a hub id instead"
        )
    if gguf.metadata.get("split.count", 1) > 1:
        raise WeightsError(f"{gguf.path} is one part of a split GGUF: merge its parts first")
    heads = _integer(gguf, "attention.head_count")
    hidden = _integer(gguf, "embedding_length")
    config: dict[str, Any] = {
        "architectures": [
            "LlamaForCausalLM" if gguf.architecture == "llama" else "Qwen2ForCausalLM"
        ],
        "model_type": gguf.architecture,
        "hidden_size": hidden,
        "intermediate_size": _integer(gguf, "feed_forward_length"),
        "num_hidden_layers": _integer(gguf, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(gguf, "attention.head_count_kv", default=heads),
        "max_position_embeddings": _integer(gguf, "context_length"),
        "rms_norm_eps": _short_float(gguf.get("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _short_float(gguf.get("rope.freq_base", 10000.0)),
        "vocab_size": _tensor(gguf, "token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
    }
    head_dim = _integer(gguf, "attention.key_length", default=hidden // heads)
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
    gguf: GgufFile, folder: Path, *, tokenizer: Tokenizer, label: str, progress: Progress
) -> dict[str, str]:
    """Write the model directory into `folder`; returns the SHA-256 of the weights file by name."""
    config = build_config(gguf, tokenizer)
    plans = [_plan(tensor, gguf, config) for tensor in gguf.tensors.values()]
    weights = "model.safetensors"
    digest = _write_safetensors(
        [plan for plan in plans if plan is not None], gguf, folder / weights, label, progress
    )
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


def _plan(tensor: GgufTensor, gguf: GgufFile, config: dict[str, Any]) -> _Plan | None:
    if tensor.name == _ROPE_FACTORS:
        return None
    if tensor.name in _GLOBAL_NAMES:
        return _Plan(_GLOBAL_NAMES[tensor.name], tensor, None)
    match tensor.name.split("."):
        case ["blk", layer, kind, ("weight" | "bias") as part] if kind in _LAYER_NAMES:
            heads = None
            if gguf.architecture == "llama" and kind in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
            return _Plan(f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{part}", tensor, heads)
    raise WeightsError(
        f"{gguf.path}: tensor {tensor.name} does not belong to a plain {gguf.architecture} model"
    )


def _write_safetensors(
    plans: list[_Plan], gguf: GgufFile, path: Path, label: str, progress: Progress
) -> str:
    """Stream the tensors out in file order; returns the SHA-256 of the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    total = 0
    for plan in plans:
        end = total + 2 * plan.source.elements
        header[plan.name] = {
            "dtype": "F16",
            "shape": list(plan.source.shape),
            "data_offsets": [total, end],
        }
        total = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    done = 0
    with open(path, "wb") as file:
        for chunk in (len(head).to_bytes(8, "little"), head):
            file.write(chunk)
            digest.update(chunk)
        progress(label, 0, total)
        # No fsync: after a power cut the manifest's sizes tell a half-written file apart.
        for slab in _slabs(plans, gguf):
            file.write(slab)
            digest.update(slab)
            done += slab.nbytes
            progress(label, done, total)
    return digest.hexdigest()


def _slabs(plans: list[_Plan], gguf: GgufFile) -> Iterator[memoryview]:
    """Converted slabs of all tensors, in order; a few are worked on ahead of the consumer."""
    workers = min(os.cpu_count() or 1, 8)
    pending: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for plan in plans:
                rows = gguf.rows(plan.source)
                if plan.heads is not None:
                    rows = _unpermuted(rows, plan.heads)
                step = max(1, SLAB_ELEMENTS // plan.source.shape[-1])
                for start in range(0, len(rows), step):
                    if len(pending) > 2 * workers:
                        yield pending.popleft().result()
                    pending.append(
                        pool.submit(_to_float16, rows[start : start + step], plan.source)
                    )
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _unpermuted(rows: Bytes, heads: int) -> Bytes:
    """Undo the row order llama GGUF files use for rotary pairs: interleaved back to halves."""
    order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows[order]


def _to_float16(rows: Bytes, tensor: GgufTensor) -> memoryview:
    """Dequantise raw rows; WeightsError if a value does not fit float16."""
    block, size = GGML_QUANT_SIZES[tensor.kind]
    raw = np.ascontiguousarray(rows).reshape(-1)
    blocks = raw.size // size
    # Rows of blocks are independent, so any row length that divides the slab will do.
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
            f"tensor {tensor.name} is of type {tensor.kind.name}, which cannot be read"
        ) from exc


def _rope_scaling(gguf: GgufFile, *, theta: float, head_dim: int) -> dict[str, Any] | None:
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
    """Llama 3 files hold the scaled frequencies, not the four numbers they were made from."""
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


def _integer(gguf: GgufFile, key: str, *, default: int | None = None) -> int:
    value = gguf.get(key, default)
    if not isinstance(value, int) or value <= 0:
        raise WeightsError(f"{gguf.path}: metadata {gguf.architecture}.{key} is {value!r}")
    return value


def _tensor(gguf: GgufFile, name: str) -> GgufTensor:
    if name not in gguf.tensors:
        raise WeightsError(f"{gguf.path} has no tensor {name}")
    return gguf.tensors[name]


def _short_float(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
