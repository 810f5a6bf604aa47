"""Conversion of a GGUF file's tokenizer to tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from mlxroute.errors import WeightsError
from mlxroute.safe_text import printable_line
from mlxroute.tokenizers.end_tokens import END_TOKENS, find_end_ids
from mlxroute.weights.gguf_file import GgufFile

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
# What llama.cpp splits by where a file says `default`, one pattern after the other.
_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPACE = "▁"
# SentencePiece learns tokens of at most 512. A longer one takes time with the square of its length.
_MAX_CHARACTERS = 1024


class _TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Contents of a tokenizer's files.

    Args:
        tokenizer: Contents of tokenizer.json.
        config: Contents of tokenizer_config.json.
        bos_id: Id of the begin token; None if there is none.
        eos_ids: Ids of the tokens that end an answer, the file's own end token first.
        size: Number of tokens, padding included.
    """

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    size: int


def build_tokenizer(gguf: GgufFile) -> TokenizerFiles:
    """Convert a file's tokenizer; raise WeightsError if it cannot be converted exactly."""
    metadata = gguf.metadata
    tokens = metadata.texts("tokenizer.ggml.tokens")
    types = _read_types(gguf, tokens)
    match metadata.text("tokenizer.ggml.model", default=""):
        case "gpt2":
            pipeline = _byte_level_pipeline(gguf, tokens, types)
        case "llama":
            pipeline = _sentencepiece_pipeline(gguf, tokens, types)
        case other:
            raise WeightsError(f"{gguf.path}: tokenizer {other!r} is not supported")
    special_ids = _special_ids(gguf, len(tokens))
    eos_ids = _eos_ids(gguf, tokens, special_ids)
    bos_id = special_ids.get("bos")
    if _adds_bos(gguf):
        if bos_id is None:
            raise WeightsError(
                f"{gguf.path} puts a begin token before a text, but does not name one: metadata"
                " tokenizer.ggml.bos_token_id is missing"
            )
        pipeline["post_processor"] = _prepend_token(tokens[bos_id], bos_id)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(tokens, types, {*special_ids.values(), *eos_ids})),
        **pipeline,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": (
            metadata.integer("{arch}.context_length")
            if metadata.has("{arch}.context_length")
            else None
        ),
    }
    for role, token_id in special_ids.items():
        config[f"{role}_token"] = tokens[token_id]
    if template := metadata.text("tokenizer.chat_template", default=""):
        config["chat_template"] = template
    return TokenizerFiles(tokenizer, config, bos_id, eos_ids, len(tokens))


def _byte_level_pipeline(
    gguf: GgufFile, tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """Return the normaliser, pre-tokenizer, decoder and model of a byte-level BPE tokenizer."""
    pre_tokenizer, is_composed = _pre_tokenizer(gguf)
    merges = [merge.split(" ", 1) for merge in gguf.metadata.texts("tokenizer.ggml.merges")]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise WeightsError(f"{gguf.path} has no usable merges for its tokenizer")
    vocabulary = _vocabulary(tokens, types)
    for left, right in merges:
        if not {left, right, left + right} <= vocabulary.keys():
            raise WeightsError(
                f"{gguf.path}: the tokenizer has no token for its merge"
                f" {printable_line(left + right)!r}"
            )
    return {
        "normalizer": {"type": "NFC"} if is_composed else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _byte_level(use_regex=False),
        "decoder": _byte_level(use_regex=False),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": _is_llama3(gguf),
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _pre_tokenizer(gguf: GgufFile) -> tuple[dict[str, Any], bool]:
    """Return how text is split into words, and whether its characters are composed before."""
    pre = gguf.metadata.text("tokenizer.ggml.pre", default="")
    match pre:
        case "qwen2" | "deepseek-r1-qwen":
            return _sequence(_split(_QWEN2_SPLIT), _byte_level(use_regex=False)), True
        case _ if _is_llama3(gguf):
            return _sequence(_split(_LLAMA3_SPLIT), _byte_level(use_regex=False)), False
        case "smollm":
            digits = {"type": "Digits", "individual_digits": True}
            return _sequence(digits, _byte_level(use_regex=True)), False
        case "gpt-2":
            return _byte_level(use_regex=True), False
        case "default":
            return _sequence(*map(_split, _DEFAULT_SPLITS), _byte_level(use_regex=False)), False
        case "":
            raise WeightsError(
                f"{gguf.path} does not say how its tokenizer splits words: metadata"
                " tokenizer.ggml.pre is missing; convert the model again with a newer llama.cpp"
            )
    raise WeightsError(f"{gguf.path}: pre-tokenizer {pre!r} is not supported")


def _is_llama3(gguf: GgufFile) -> bool:
    return gguf.metadata.text("tokenizer.ggml.pre", default="") in _LLAMA3_NAMES


def _sentencepiece_pipeline(
    gguf: GgufFile, tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """Return the normaliser, decoder and model of a SentencePiece BPE tokenizer."""
    scores = gguf.metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise WeightsError(f"{gguf.path} has no scores for its tokenizer")
    _check_lengths(gguf, tokens)
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if gguf.metadata.flag("tokenizer.ggml.add_space_prefix", default=True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next(
        (t for t, kind in zip(tokens, types, strict=True) if kind == _TokenType.UNKNOWN), None
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


def _check_lengths(gguf: GgufFile, tokens: Sequence[str]) -> None:
    """Raise WeightsError for a token that is too long to try every cut of it."""
    longest = max(map(len, tokens))
    if longest > _MAX_CHARACTERS:
        raise WeightsError(
            f"{gguf.path}: the tokenizer has a token of {longest:,} characters, more than"
            f" {_MAX_CHARACTERS:,}"
        )


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Return BPE merges in SentencePiece's order: the best-scored result first."""
    mergeable = {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_TokenType.NORMAL, _TokenType.USER_DEFINED)
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
    """Return ids by token, without padding rows (`[PAD151665]`), as in the published tokenizers."""
    return {
        token: token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _TokenType.UNUSED
    }


def _added_tokens(
    tokens: Sequence[str], types: Sequence[int], special_ids: set[int]
) -> Iterator[dict[str, Any]]:
    """Yield the `added_tokens` of tokenizer.json: special and user-defined tokens."""
    for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        special = kind in (_TokenType.CONTROL, _TokenType.UNKNOWN) or token_id in special_ids
        if special or kind == _TokenType.USER_DEFINED:
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
    """Return special token ids by their role in transformers, without those of no token."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        role: gguf.metadata.token_id(
            f"tokenizer.ggml.{key}_token_id", count, is_optional=role in ("unk", "pad")
        )
        for role, key in names.items()
    }
    return {role: token_id for role, token_id in ids.items() if token_id is not None}


def _read_types(gguf: GgufFile, tokens: Sequence[str]) -> list[int]:
    """Return the types of the tokens, with the known end tokens as control tokens."""
    key = "tokenizer.ggml.token_type"
    types = gguf.metadata.integers(key) or [_TokenType.NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise WeightsError(f"{gguf.path} contains no usable tokenizer")
    if not set(types) <= {0, *_TokenType}:
        raise gguf.metadata.refuse(key)
    return [
        _TokenType.CONTROL if token in END_TOKENS else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def _eos_ids(
    gguf: GgufFile, tokens: Sequence[str], special_ids: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the ids that end an answer, the file's own end token first."""
    ids = [special_ids[role] for role in ("eos",) if role in special_ids]
    for role in ("eot", "eom"):
        token_id = gguf.metadata.token_id(f"tokenizer.ggml.{role}_token_id", len(tokens))
        ids += [] if token_id is None else [token_id]
    several = gguf.metadata.integers("tokenizer.ggml.eos_token_ids")
    if not all(0 <= token_id < len(tokens) for token_id in several):
        raise gguf.metadata.refuse("tokenizer.ggml.eos_token_ids")
    ids += several
    ids += find_end_ids({token: token_id for token_id, token in enumerate(tokens)})
    if not ids:
        raise WeightsError(f"{gguf.path} names no token that ends an answer")
    return tuple(dict.fromkeys(ids))


def _adds_bos(gguf: GgufFile) -> bool:
    """Return whether encoding puts the begin token first; the default depends on the tokenizer."""
    metadata = gguf.metadata
    is_sentencepiece = metadata.text("tokenizer.ggml.model", default="") == "llama"
    default = is_sentencepiece or _is_llama3(gguf)
    return metadata.flag("tokenizer.ggml.add_bos_token", default=default)


def _prepend_token(token: str, token_id: int) -> dict[str, Any]:
    """Return a post-processor that puts a token in front of the text."""
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


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": use_regex,
    }
