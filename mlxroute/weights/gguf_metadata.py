"""The metadata of a GGUF file: values by key, with their types and bounds checked.

A value that changes what the model computes is either read by the conversion, or has no effect, or
is refused with its key. Keys are written as in the GGUF specification; `{arch}` stands for the
model family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mlxroute.errors import WeightsError

# Ids that mean "no such token": -1, and the same as an unsigned number.
_NO_TOKEN: Final = (-1, 2**32 - 1)
_LARGEST_COUNT: Final = 2**31 - 1

# Keys that say nothing about what a llama or qwen2 model computes, or that its tokenizer skips.
_DESCRIPTIVE: Final = re.compile(
    r"\{arch\}\.(vocab_size|tensor_data_layout|rope\.scaling\.finetuned"
    r"|attention\.layer_norm_epsilon)"
    r"|general\.(?!type$|quantization_version$).*"
    r"|tokenizer\.(ggml\.(\w+_token_id|token_type_count|scores|merges|pre)"
    r"|chat_template\..+|chat_templates|huggingface\.json|rwkv\.world)"
)
# Keys whose listed values have no effect; their other values are refused.
_NO_EFFECT: Final[Mapping[str, tuple[object, ...]]] = {
    "general.type": ("model",),
    "general.quantization_version": (2,),
    "{arch}.attention.causal": (True,),
    "{arch}.attention.clamp_kqv": (0,),
    "{arch}.attention.max_alibi_bias": (0,),
    "{arch}.attention.output_scale": (0, 1),
    "{arch}.attention.temperature_length": (0,),
    "{arch}.attention.temperature_scale": (0,),
    "{arch}.attn_logit_softcapping": (0,),
    "{arch}.final_logit_softcapping": (0,),
    "{arch}.router_logit_softcapping": (0,),
    "{arch}.embedding_scale": (0, 1),
    "{arch}.residual_scale": (0, 1),
    "{arch}.logit_scale": (0, 1),
    "{arch}.expert_count": (0,),
    "{arch}.expert_used_count": (0,),
    "{arch}.expert_shared_count": (0,),
    "{arch}.leading_dense_block_count": (0,),
    "{arch}.nextn_predict_layers": (0,),
    "{arch}.pooling_type": (0,),
    "{arch}.use_parallel_residual": (False,),
    "{arch}.rope.scaling.attn_factor": (0, 1),
    "{arch}.rope.scaling.yarn_attn_factor": (1,),
    "{arch}.rope.scaling.yarn_ext_factor": (-1, 1),
    "{arch}.rope.scaling.yarn_log_multiplier": (0,),
    "tokenizer.ggml.add_eos_token": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "tokenizer.ggml.precompiled_charsmap": ([],),
}
# Files with keys of these groups are not language models, or compute what no plain one does.
_OTHER_KINDS: Final = ("adapter.", "clip.", "controlvector.", "diffusion.", "imatrix.", "xielu.")


class GgufMetadata:
    """Reads values by key and remembers which were read; `refuse_unread` checks the others.

    Args:
        values: Values by key, as the file has them.
        path: The file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self._values = dict(values)
        self._path = path
        self._read: set[str] = set()
        self.architecture = self.text("general.architecture", default="")

    def integer(self, key: str, *, default: int | None = None, most: int = _LARGEST_COUNT) -> int:
        """Return a positive integer of at most `most`; a list of equal integers counts as one."""

        def is_valid(value: Any) -> bool:
            return _is_integer(value) and 0 < value <= most

        value = self._get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return int(self._checked(key, value, is_valid, f"a positive integer of at most {most}"))

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a finite number that is not negative."""

        def is_valid(value: Any) -> bool:
            return _is_number(value) and math.isfinite(value) and value >= 0

        return float(
            self._checked(key, self._get(key, default), is_valid, "a number of at least 0")
        )

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        return bool(self._checked(key, value, lambda item: isinstance(item, bool), "a boolean"))

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return a text."""
        value = self._get(key, default)
        return str(self._checked(key, value, lambda item: isinstance(item, str), "a text"))

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; empty if the key is missing."""
        return self._items(key, lambda item: isinstance(item, str), "texts")

    def integers(self, key: str) -> list[int]:
        """Return a list of integers; empty if the key is missing."""
        return self._items(key, _is_integer, "integers")

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers without NaN; empty if the key is missing."""
        return self._items(key, lambda item: _is_number(item) and item == item, "numbers")

    def token_id(self, key: str, count: int, *, is_optional: bool = False) -> int | None:
        """Return the id of a token below `count`; None if the file names none.

        With `is_optional`, an id that is too large counts as none.
        """

        def is_valid(value: Any) -> bool:
            return _is_integer(value) and 0 <= value < count

        value = self._get(key, None)
        if value is None or (_is_integer(value) and value in _NO_TOKEN):
            return None
        if is_optional and not is_valid(value):
            return None
        return int(self._checked(key, value, is_valid, f"the id of one of {count} tokens"))

    def has(self, key: str) -> bool:
        """Return whether the file has a key, without reading its value."""
        return self._full(key) in self._values

    def refuse(self, key: str) -> WeightsError:
        """Return the error for a value that the conversion to MLX cannot express."""
        value = self._values.get(self._full(key))
        return WeightsError(
            f"{self._path}: metadata {self._full(key)} = {_short(value)} cannot be converted to"
            " MLX; use a model directory or a hub id instead"
        )

    def refuse_unread(self) -> None:
        """Raise WeightsError, with its key, for a value that was not read and has an effect."""
        prefix = f"{self.architecture}."
        for name, value in self._values.items():
            if name in self._read:
                continue
            key = "{arch}." + name.removeprefix(prefix) if name.startswith(prefix) else name
            if _has_no_effect(key, value) or _DESCRIPTIVE.fullmatch(key):
                continue
            if key.startswith(("{arch}.", "general.", "tokenizer.", *_OTHER_KINDS)):
                raise self.refuse(name)

    def _items(self, key: str, is_item: Callable[[Any], bool], noun: str) -> list[Any]:
        def is_valid(value: object) -> bool:
            return isinstance(value, list) and all(is_item(item) for item in value)

        return list(self._checked(key, self._get(key, []), is_valid, f"a list of {noun}"))

    def _get(self, key: str, default: object) -> Any:
        name = self._full(key)
        self._read.add(name)
        return self._values.get(name, default)

    def _full(self, key: str) -> str:
        return key.replace("{arch}", self.architecture) if "{arch}" in key else key

    def _checked(self, key: str, value: Any, is_valid: Callable[[Any], bool], noun: str) -> Any:
        if is_valid(value):
            return value
        name = self._full(key)
        if name not in self._values:
            raise WeightsError(f"{self._path} has no metadata {name}, which must be {noun}")
        raise WeightsError(
            f"{self._path}: metadata {name} must be {noun}, not {_short(value)};"
            " the file is damaged or was converted wrongly"
        )


def _has_no_effect(key: str, value: object) -> bool:
    return any(
        type(value) is type(neutral) and value == neutral
        if isinstance(neutral, (bool, str, list))
        else _is_number(value) and value == neutral
        for neutral in _NO_EFFECT.get(key, ())
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)} values"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
