"""Bytes in vocabulary pieces: the byte-level BPE alphabet, and SentencePiece's marks."""

from __future__ import annotations

import re
from typing import Final

SPACE_MARK: Final = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    # Byte-level BPE writes printable Latin-1 as itself and the other bytes as U+0100 onwards.
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF: Final = _byte_alphabet()
"""The byte that each character of a byte-level BPE vocabulary stands for."""


def byte_piece(piece: str) -> bytes | None:
    """Return the byte of a piece such as `<0x0A>`; None for any other piece."""
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else None
