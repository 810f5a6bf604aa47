"""The bytes of raw vocabulary pieces (`Ġthe`, `▁the`, `<0x0A>`)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from mlxroute.tokenizers.byte_pieces import BYTE_OF, SPACE_MARK, byte_piece
from mlxroute.tokenizers.control_tokens import is_control_token


class _Family(Enum):
    BYTE_LEVEL = auto()
    SENTENCEPIECE = auto()


class PieceReader:
    """Reads the pieces of one vocabulary, whose family is inferred from earlier pieces."""

    def __init__(self) -> None:
        self._family: _Family | None = None

    def learn(self, pieces: Iterable[str]) -> None:
        """Infer the family from the first piece that marks a leading space or a line break."""
        if self._family is not None:
            return
        for piece in pieces:
            if is_control_token(piece):
                continue
            if piece.startswith(SPACE_MARK):
                self._family = _Family.SENTENCEPIECE
            elif piece.startswith(("Ġ", "Ċ")):
                self._family = _Family.BYTE_LEVEL
            else:
                continue
            return

    def read(self, piece: str) -> bytes | None:
        """Return the bytes of a piece of text, None if they depend on an unknown family."""
        if (byte := byte_piece(piece)) is not None:
            return byte
        if piece.isascii():
            return piece.encode()
        byte_values = [BYTE_OF.get(char, -1) for char in piece]
        if self._family is _Family.SENTENCEPIECE or -1 in byte_values:
            return piece.replace(SPACE_MARK, " ").encode()
        return bytes(byte_values) if self._family is _Family.BYTE_LEVEL else None
