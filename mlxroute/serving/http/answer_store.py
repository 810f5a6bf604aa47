"""The documents of the latest answers, for clients that look at them later."""

from __future__ import annotations

import hmac
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

DEFAULT_STORE_BYTES: Final = 32 * 2**20
_FAST_COMPRESSION: Final = 1


@dataclass(frozen=True, slots=True)
class _StoredAnswer:
    owner: str
    packed: bytes


class AnswerStore:
    """Keeps the documents of answers, the oldest of which give way. Thread-safe.

    Args:
        max_bytes: Maximum size of all documents, compressed. 32 MiB by default.
    """

    def __init__(self, max_bytes: int = DEFAULT_STORE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, _StoredAnswer] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answer_id: str, owner: str, document: bytes) -> None:
        """Keep a document, which only the same `owner` can read; "" stands for everybody."""
        answer = _StoredAnswer(owner, zlib.compress(document, _FAST_COMPRESSION))
        with self._lock:
            self._answers[answer_id] = answer
            self.size_bytes += len(answer.packed)
            while self.size_bytes > self._max_bytes:
                _, oldest = self._answers.popitem(last=False)
                self.size_bytes -= len(oldest.packed)

    def find(self, answer_id: str, owner: str) -> bytes | None:
        """Return a document; None if it is not there or another owner's."""
        with self._lock:
            answer = self._answers.get(answer_id)
        if answer is None or not hmac.compare_digest(answer.owner, owner):
            return None
        return zlib.decompress(answer.packed)
