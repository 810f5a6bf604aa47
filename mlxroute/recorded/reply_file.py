"""The file of the large model's replies: none that it gave is asked for again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlxroute.recorded.record_file import append_records, read_records
from mlxroute.recorded.reply_records import (
    WholeAnswer,
    ids_key,
    keyed_record,
    token_to_json,
    whole_key,
)
from mlxroute.types import LargeToken, Message


class ReplyFile:
    """Tokens by the token ids before them, and whole answers by their conversation. Thread-safe.

    The file, `path`, belongs to one pair of models, because the ids are those of the small model's
    vocabulary. It is read at once, and each new reply is appended to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._tokens: dict[str, LargeToken] = {}
        self._wholes: dict[str, WholeAnswer] = {}
        for key, record in read_records(path, keyed_record):
            if isinstance(record, WholeAnswer):
                self._wholes[key] = record
            else:
                self._tokens[key] = record

    def find_tokens(self, token_ids: Sequence[int], limit: int) -> tuple[LargeToken, ...]:
        """Return the recorded tokens that follow these ids without a gap, at most `limit`."""
        tokens: list[LargeToken] = []
        ids = list(token_ids)
        with self._lock:
            while len(tokens) < limit and (token := self._tokens.get(ids_key(ids))) is not None:
                tokens.append(token)
                ids += token.token_ids
        return tuple(tokens)

    def add_tokens(self, token_ids: Sequence[int], tokens: Sequence[LargeToken]) -> None:
        """Record the tokens that follow these ids, in memory and on disk."""
        ids, items = list(token_ids), []
        with self._lock:
            for token in tokens:
                key = ids_key(ids)
                if key not in self._tokens:
                    self._tokens[key] = token
                    items.append({"key": key, **token_to_json(token)})
                ids += token.token_ids
            append_records(self.path, items)

    def find_whole(self, conversation: Sequence[Message], max_tokens: int) -> WholeAnswer | None:
        """Return the recorded answer of at most `max_tokens` tokens; None if there is none."""
        key = whole_key(conversation, max_tokens)
        with self._lock:
            return self._wholes.get(key)

    def add_whole(
        self, conversation: Sequence[Message], max_tokens: int, whole: WholeAnswer
    ) -> None:
        """Record a whole answer, in memory and on disk."""
        key = whole_key(conversation, max_tokens)
        with self._lock:
            self._wholes[key] = whole
            append_records(self.path, [{"key": key, "whole": asdict(whole)}])
