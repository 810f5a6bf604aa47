"""Control tokens (`<|im_end|>`, `</s>`, `[INST]`), recognised by the form of their names."""

from __future__ import annotations

import re
from typing import Final

from mlxroute.tokenizers.byte_pieces import byte_piece

# Names in single angle brackets are listed: many vocabularies have HTML tags as ordinary tokens.
_CONTROL_TOKEN: Final = re.compile(
    r"<[|｜][^<>\s]*[|｜]>|\[/?[A-Z_]{4,}\]"
    r"|</?(?:s|bos|eos|pad|unk|mask|think|im_start|im_end|(?:start|end)_of_turn|end_of_utterance"
    r"|tool_(?:call|response)|unused\d+)>"
)


def is_control_token(piece: str) -> bool:
    """Return whether a vocabulary piece has the form of a control token, which is not text."""
    return _CONTROL_TOKEN.fullmatch(piece) is not None and byte_piece(piece) is None
