"""Tiny GGUF files with known weights, and a NumPy forward pass that reads them directly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

Array = np.ndarray[Any, np.dtype[np.float32]]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters of byte-level BPE, in the order of their bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """Properties of a tiny model that a test may vary; sizes are multiples of 32-element blocks."""

    architecture: str = "llama"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 64
    feed_forward: int = 96
    theta: float = 10000.0
    tied: bool = False
    kind: GGMLQuantizationType = GGMLQuantizationType.F32
    pre: str = "qwen2"
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Array] = field(default_factory=dict)

    @property
    def tokens(self) -> list[str]:
        """Tokens: bytes, three merges, four control tokens, a tool token, two padding rows."""
        control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other|>"]
        return [*byte_alphabet(), "th", "the", "Ġthe", *control, "<tool>", "[PAD264]", "[PAD265]"]


def write_gguf(path: Path, model: TinyModel, *, seed: int = 0) -> Path:
    """Write a model with random weights and return its path."""
    writer = GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_rope_freq_base(model.theta)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer, model)
    for key, value in model.metadata.items():
        for values in writer.kv_data:  # A test's value replaces a standard one.
            values.pop(key, None)
        _add_value(writer, key, value)
    for name, tensor in _tensors(model, np.random.default_rng(seed)).items():
        kind = model.kind if tensor.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_logits(path: Path, token_ids: list[int]) -> Array:
    """Return logits [positions, vocabulary], computed in NumPy from the file's own layout.

    In llama files, rotary pairs are neighbouring elements; in qwen2 files, elements of two halves.
    """
    reader = GGUFReader(path)
    weights = {
        t.name: np.array(dequantize(t.data, t.tensor_type), dtype=np.float32)
        for t in reader.tensors
    }

    def value(key: str) -> Any:
        return reader.fields[f"{architecture}.{key}"].contents()

    architecture = reader.fields["general.architecture"].contents()
    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    theta, epsilon = value("rope.freq_base"), value("attention.layer_norm_rms_epsilon")
    x = weights["token_embd.weight"][token_ids]
    size = x.shape[1] // heads
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(0, size, 2) / size))
    if "rope_freqs.weight" in weights:
        angles = angles / weights["rope_freqs.weight"]
    mask = np.triu(np.full((len(x), len(x)), -np.inf, np.float32), 1)
    for layer in range(value("block_count")):
        w = {k.removeprefix(f"blk.{layer}."): v for k, v in weights.items()}
        h = _norm(x, w["attn_norm.weight"], epsilon)
        q, k, v = (
            (h @ w[f"attn_{name}.weight"].T + w.get(f"attn_{name}.bias", 0.0)).reshape(
                len(x), -1, size
            )
            for name in "qkv"
        )
        q, k = (_rotate(a, angles, neighbours=architecture == "llama") for a in (q, k))
        k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size) + mask
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", attention, v).reshape(len(x), -1)
        x = x + mixed @ w["attn_output.weight"].T
        h = _norm(x, w["ffn_norm.weight"], epsilon)
        gate = h @ w["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
    head = weights.get("output.weight", weights["token_embd.weight"])
    return np.asarray(_norm(x, weights["output_norm.weight"], epsilon) @ head.T)


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight)


def _rotate(x: Array, angles: Array, *, neighbours: bool) -> Array:
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    first, second = (
        (np.s_[..., 0::2], np.s_[..., 1::2])
        if neighbours
        else (np.s_[..., :half], np.s_[..., half:])
    )
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[first] * sin + x[second] * cos
    return out


def _tensors(model: TinyModel, random: np.random.Generator) -> dict[str, Array]:
    size = model.hidden // model.heads
    rows = {
        "attn_q": (model.hidden, model.hidden),
        "attn_k": (model.kv_heads * size, model.hidden),
        "attn_v": (model.kv_heads * size, model.hidden),
        "attn_output": (model.hidden, model.hidden),
        "ffn_gate": (model.feed_forward, model.hidden),
        "ffn_up": (model.feed_forward, model.hidden),
        "ffn_down": (model.hidden, model.feed_forward),
    }

    def noise(*shape: int) -> Array:
        return (random.standard_normal(shape) * 0.2).astype(np.float32)

    tensors = {"token_embd.weight": noise(len(model.tokens), model.hidden)}
    for layer in range(model.layers):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = 1 + noise(model.hidden)
        for name, shape in rows.items():
            tensors[f"blk.{layer}.{name}.weight"] = noise(*shape)
            if model.architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{name}.bias"] = noise(shape[0])
    tensors["output_norm.weight"] = 1 + noise(model.hidden)
    if not model.tied:
        tensors["output.weight"] = noise(len(model.tokens), model.hidden)
    return {**tensors, **model.extra}


def _add_tokenizer(writer: GGUFWriter, model: TinyModel) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(model.pre)
    writer.add_token_list(model.tokens)
    writer.add_token_types([1] * 259 + [3] * 4 + [4] + [5] * 2)
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(261)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
