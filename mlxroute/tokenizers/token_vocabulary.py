"""Token ids to bytes and back, for byte-level BPE and SentencePiece vocabularies."""

from __future__ import annotations

import itertools
import re
import threading
import unicodedata
from functools import cached_property
from typing import Any, Final

from mlxroute.tokenizers.byte_pieces import BYTE_OF, SPACE_MARK, byte_piece
from mlxroute.tokenizers.control_tokens import ControlTokens, is_control_token
from mlxroute.tokenizers.end_tokens import find_end_ids

_ANCHOR: Final = "\n"
# Templates may make names of them: '<|' + message['role'] + '|>'.
_ROLES: Final = frozenset({"system", "user", "assistant"})


class TokenVocabulary:
    """The vocabulary of a loaded tokenizer; implements `mlxroute.types.Vocabulary`.

    Args:
        tokenizer: `mlx_lm`'s TokenizerWrapper around a fast tokenizer, or a FastTokenizer.

    Attributes:
        control_ids: The ids of the control tokens, by name.
        controls: Their names.
        bos_text: The name of the begin token that the tokenizer puts before a text; "" for none.
        drops_space: Whether decoding leaves out a space at the beginning of a text, which encoding
            puts there.
        encoding_lock: Held while the tokenizer encodes: those of transformers must not do so in two
            threads at once.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encoding_lock = threading.RLock()
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = "ByteLevel" in repr(decoder)
        self.drops_space = decoder is not None and decoder.decode([f"{SPACE_MARK}a"]) == "a"
        added = tokenizer.added_tokens_decoder
        self._added: dict[int, str] = {
            int(token_id): token.content for token_id, token in added.items()
        }
        # Ids may have gaps before the added tokens: the number of tokens is not a bound.
        self._size = max(len(tokenizer), *(token_id + 1 for token_id in self._added), 0)
        self._special = {int(token_id) for token_id, token in added.items() if token.special}
        # A role may name a token that the vocabulary lacks.
        self._special |= set(tokenizer.all_special_ids) - {None}
        self.control_ids = self._find_control_ids()
        self.controls = ControlTokens(self.control_ids)
        first = list(tokenizer.encode("a"))[:1]
        self.bos_text: str = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""
        self._bytes: dict[int, bytes] = {}
        self._anchor_ids: tuple[int, ...] = ()
        # SentencePiece tokenizers add a space before every text, also before a part of an answer.
        if self.token_bytes(next(iter(self._plain("a")), -1)).startswith(b" "):
            self._anchor_ids = self._plain(_ANCHOR)

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.eos_token_ids)

    @cached_property
    def end_id(self) -> int:
        ids = self.eos_ids
        # The chat template shows how turns end; the tokenizer may name the end of texts instead.
        template = str(self._tokenizer.chat_template)
        shown = {name: i for name, i in self.control_ids.items() if name in template}
        candidates = (*find_end_ids(shown), self._tokenizer.eos_token_id)
        return next((i for i in candidates if i in ids), min(ids))

    @property
    def size(self) -> int:
        return self._size

    def piece(self, token_id: int) -> str | None:
        if not 0 <= token_id < self._size:
            return None
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        if token_id not in self._bytes:
            self._bytes[token_id] = self._spell(token_id)
        return self._bytes[token_id]

    @property
    def control_names(self) -> frozenset[str]:
        return self.controls.names

    @cached_property
    def special_names(self) -> frozenset[str]:
        return frozenset(name for name, i in self.control_ids.items() if i in self._special)

    @cached_property
    def template_ids(self) -> frozenset[int]:
        template = str(self._tokenizer.chat_template)
        ids = {
            token_id
            for name, token_id in self.control_ids.items()
            if name in template or re.sub(r"\W", "", name).lower() in _ROLES
        }
        if self.bos_text or "bos_token" in template:
            ids |= {self._tokenizer.bos_token_id} - {None}
        return self.eos_ids | ids

    @cached_property
    def unexpected_ids(self) -> frozenset[int]:
        """The ids of control tokens, without the one that stands for an unknown character."""
        ends = {*self.eos_ids, self._tokenizer.bos_token_id}
        unknown = {getattr(self._tokenizer, "unk_token_id", None)} - ends
        return frozenset(self.control_ids.values()) - unknown

    def encode_content(self, text: str, *, prefixed: bool) -> tuple[int, ...]:
        """Return the ids of a message's content, none of which is a control token.

        `prefixed` adds the space that SentencePiece tokenizers put before a text.
        """
        ids = self._plain(text) if prefixed and self._anchor_ids else self.encode(text)
        if self.unexpected_ids.isdisjoint(ids):
            return ids
        starts = [start + 1 for start, _ in self.controls.find(text)]
        if starts == [] or starts == [len(text)]:
            starts = [len(text) // 2]
        if len(text) <= 1:
            return tuple(i for i in self._spell_bytes(text) if i not in self.unexpected_ids)
        cuts = [0, *starts, len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        encoded = [self.encode_content(parts[0], prefixed=prefixed)]
        encoded += [self.encode_content(part, prefixed=False) for part in parts[1:]]
        return tuple(token_id for ids in encoded for token_id in ids)

    def encode(self, text: str) -> tuple[int, ...]:
        ids, data = self._without_prefix(text), text.encode()
        if b"".join(map(self.token_bytes, ids)) == data:
            return ids
        # Normalisation changed a character: only that one is encoded as bytes.
        if len(text) > 1:
            return tuple(itertools.chain(*map(self.encode, self._split_changed(text))))
        return self._spell_bytes(text) or ids

    def _split_changed(self, text: str) -> list[str]:
        """Split a text that normalisation changes into what it changes and the texts between.

        Where that is not one character with its combining marks, the text is halved.
        """
        units: list[str] = []
        for character in text:
            if units and unicodedata.combining(character):
                units[-1] += character
            else:
                units.append(character)
        changed = {unit for unit in set(units) if self._decode(unit) != unit.encode()}
        parts: list[str] = []
        for is_changed, group in itertools.groupby(units, changed.__contains__):
            run = list(group)
            parts += run if is_changed else ["".join(run)]
        middle = len(text) // 2
        return parts if len(parts) > 1 else [text[:middle], text[middle:]]

    def _decode(self, text: str) -> bytes:
        """Return the bytes of the ids that the tokenizer gives for a text."""
        return b"".join(map(self.token_bytes, self._without_prefix(text)))

    def _spell_bytes(self, text: str) -> tuple[int, ...]:
        """Return the ids of the bytes of a text; none if one of them has no id."""
        spelled = [self._byte_ids.get(byte) for byte in text.encode()]
        return () if None in spelled else tuple(i for i in spelled if i is not None)

    def _find_control_ids(self) -> dict[str, int]:
        ids = self._special | {i for i, name in self._added.items() if is_control_token(name)}
        named = {self._added.get(i) or self.piece(i) or "": i for i in ids | set(self.eos_ids)}
        return {name: token_id for name, token_id in named.items() if name}

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The id of each byte, as far as the vocabulary has ids for single bytes."""
        pieces = {byte: char for char, byte in BYTE_OF.items()}
        if not self._byte_level:
            pieces = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        entries = self._tokenizer.get_vocab()
        return {byte: entries[piece] for byte, piece in pieces.items() if piece in entries}

    def _without_prefix(self, text: str) -> tuple[int, ...]:
        if not self._anchor_ids or not text:
            return self._plain(text)
        ids, start = self._plain(_ANCHOR + text), len(self._anchor_ids)
        return ids[start:] if ids[:start] == self._anchor_ids else self._plain(text)

    def _plain(self, text: str) -> tuple[int, ...]:
        with self.encoding_lock:
            ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(ids)

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if token_id in self._added:
            content = self._added[token_id]
            # Gemma's added tokens include runs of spaces.
            return (content if self._byte_level else content.replace(SPACE_MARK, " ")).encode()
        piece = self.piece(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(
                bytes([BYTE_OF[char]]) if char in BYTE_OF else char.encode() for char in piece
            )
        byte = byte_piece(piece)
        return piece.replace(SPACE_MARK, " ").encode() if byte is None else byte
