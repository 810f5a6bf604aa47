"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from mlxroute.errors import WeightsError
from mlxroute.weights.gguf_file import GgufFile

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
# Control tokens that end an answer whatever the file calls its end token.
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
_SPACE = "▁"


class _Type(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Both files' contents, and the ids config.json needs."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    bos_id: int | None
    eos_ids: tuple[int, ...]


def build_tokenizer(gguf: GgufFile) -> Tokenizer:
    """Translate the file's tokenizer; WeightsError for a kind that is not known exactly."""
    metadata = gguf.metadata
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [_Type.NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise WeightsError(f"{gguf.path} holds no usable tokenizer")
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            pipeline = _byte_level(gguf, tokens, types)
        case "llama":
            pipeline = _sentencepiece(gguf, tokens, types)
        case other:
            raise WeightsError(f"{gguf.path}: tokenizer {other!r} is not supported")
    special_ids = _special_ids(gguf, len(tokens))
    bos_id = special_ids.get("bos")
    if _adds_bos(gguf) and bos_id is not None:
        pipeline["post_processor"] = _prepend(tokens[bos_id], bos_id)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(tokens, types, set(special_ids.values()))),
        **pipeline,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.get("context_length"),
    }
    for role, token_id in special_ids.items():
        config[f"{role}_token"] = tokens[token_id]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return Tokenizer(tokenizer, config, bos_id, _eos_ids(gguf, tokens, types, special_ids))


def _byte_level(gguf: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    pre = gguf.metadata.get("tokenizer.ggml.pre", "default")
    normalizer: dict[str, Any] | None = None
    ignore_merges = False
    match pre:
        case "qwen2" | "deepseek-r1-qwen":
            normalizer = {"type": "NFC"}
            pre_tokenizer = _sequence(_split(_QWEN2_SPLIT), _bytes(use_regex=False))
        case "llama-bpe" | "llama3" | "llama-v3":
            ignore_merges = True
            pre_tokenizer = _sequence(_split(_LLAMA3_SPLIT), _bytes(use_regex=False))
        case "smollm":
            digits = {"type": "Digits", "individual_digits": True}
            pre_tokenizer = _sequence(digits, _bytes(use_regex=True))
        case "default" | "gpt-2":
            pre_tokenizer = _bytes(use_regex=True)
        case _:
            raise WeightsError(f"{gguf.path}: pre-tokenizer {pre!r} is not supported")
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    if not merges:
        raise WeightsError(f"{gguf.path} has no merges for its tokenizer")
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _bytes(use_regex=False),
        "decoder": _bytes(use_regex=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": _vocabulary(tokens, types),
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _sentencepiece(gguf: GgufFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise WeightsError(f"{gguf.path} has no scores for its tokenizer")
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if gguf.metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next(
        (t for t, kind in zip(tokens, types, strict=True) if kind == _Type.UNKNOWN), None
    )
    return {
        "normalizer": _sequence(*normalizers, key="normalizers"),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _sequence(*decoders, key="decoders"),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": _vocabulary(tokens, types),
            "merges": _merges_from_scores(tokens, types, scores),
        },
    }


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """SentencePiece joins the pair with the best-scored result first: merges in that order."""
    mergeable = {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_Type.NORMAL, _Type.USER_DEFINED)
    }
    ranked = []
    for token, token_id in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[token_id], token_id, mergeable[left], [left, right]))
    ranked.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in ranked]


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Padding rows (`[PAD151665]`) are left out, as in the publishers' own tokenizers."""
    return {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _Type.UNUSED
    }


def _added_tokens(
    tokens: Sequence[str], types: Sequence[int], special_ids: set[int]
) -> Iterator[dict[str, Any]]:
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind in (_Type.CONTROL, _Type.UNKNOWN) or token_id in special_ids
        if special or kind == _Type.USER_DEFINED:
            yield {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }


def _special_ids(gguf: GgufFile, count: int) -> dict[str, int]:
    """Ids by transformers' role name; ids outside the vocabulary are ignored."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {
        role: gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in names.items()
    }
    return {role: i for role, i in found.items() if isinstance(i, int) and 0 <= i < count}


def _eos_ids(
    gguf: GgufFile, tokens: Sequence[str], types: Sequence[int], special_ids: dict[str, int]
) -> tuple[int, ...]:
    """Every id that ends an answer, the file's own end token first."""
    ids = [special_ids[role] for role in ("eos",) if role in special_ids]
    if isinstance(turn_end := gguf.metadata.get("tokenizer.ggml.eot_token_id"), int):
        ids.append(turn_end)
    ids += [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _Type.CONTROL and token in _END_TOKENS
    ]
    if not ids:
        raise WeightsError(f"{gguf.path} names no token that ends an answer")
    return tuple(dict.fromkeys(ids))


def _adds_bos(gguf: GgufFile) -> bool:
    """Whether a text starts with the begin token; the default depends on the tokenizer."""
    sentencepiece = gguf.metadata.get("tokenizer.ggml.model") == "llama"
    llama3 = gguf.metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    return bool(gguf.metadata.get("tokenizer.ggml.add_bos_token", sentencepiece or llama3))


def _prepend(token: str, token_id: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _sequence(*steps: dict[str, Any], key: str = "pretokenizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }
