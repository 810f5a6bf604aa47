"""Raw vocabulary pieces (`Ġthe`, `▁the`, `<0x0A>`) to the bytes they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from mlxroute.tokenizers.byte_pieces import BYTE_OF, SPACE_MARK, byte_piece
from mlxroute.tokenizers.control_tokens import is_control_token


class _Family(Enum):
    BYTE_LEVEL = auto()
    SENTENCEPIECE = auto()


class PieceReader:
    """Reads one vocabulary's pieces, having learned from those seen which family it is of."""

    def __init__(self) -> None:
        self._family: _Family | None = None

    def learn(self, pieces: Iterable[str]) -> None:
        """Settle the family by the first piece that marks a leading space."""
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
        """The bytes of a piece that is text; None while its family leaves them open."""
        if (byte := byte_piece(piece)) is not None:
            return byte
        if piece.isascii():
            return piece.encode()
        octets = [BYTE_OF.get(char, -1) for char in piece]
        if self._family is _Family.SENTENCEPIECE or -1 in octets:
            return piece.replace(SPACE_MARK, " ").encode()
        return bytes(octets) if self._family is _Family.BYTE_LEVEL else None
