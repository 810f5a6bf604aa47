"""Tokens that end an answer, known by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

END_TOKENS: Final = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<|END_OF_TURN_TOKEN|>",
    "<|endofturn|>",
    "<|role_end|>",
    "<｜end▁of▁sentence｜>",
    "<seed:eos>",
    "[|endofturn|]",
    "[e~[",
)
# In vocabularies with this token, `<|end|>` only ends a part of an answer, such as its reasoning.
_ANSWER_END: Final = "<|return|>"
_PART_END: Final = "<|end|>"


def find_end_ids(ids: Mapping[str, int]) -> list[int]:
    """Return the ids of the known end tokens in a vocabulary, given its ids by token."""
    names = [name for name in END_TOKENS if name in ids]
    if _ANSWER_END in names:
        names = [name for name in names if name != _PART_END]
    return [ids[name] for name in names]
