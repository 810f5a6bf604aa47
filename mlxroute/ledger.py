"""A record of what is sent to the large model: totals and, on request, every request body."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

from mlxroute.closeable import Closeable
from mlxroute.errors import LargeUnrecorded, UsageError
from mlxroute.safe_text import one_line_json
from mlxroute.types import Uploads

_REDACTED = "[key]"
# Shorter keys, such as `na` or `token`, are for servers that need none, and are in any text.
_MIN_SECRET: Final = 8
# Shorter secrets, such as `password` or `not-needed`, may be words of an answer.
_MIN_REFUSED: Final = 16
# Characters at the end of a text by which the beginning of a secret is recognised.
_RECOGNISED: Final = 8


def _now() -> datetime:
    return datetime.now(UTC)


def is_secret(text: str) -> bool:
    """Return whether a key is long enough to be looked for in texts."""
    return len(text) >= _MIN_SECRET


class Secrets:
    """The keys and passwords of servers, which are to be in no output. Safe for several threads."""

    def __init__(self) -> None:
        self._texts: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def add(self, *secrets: str) -> None:
        """Add texts that are to be in no output; empty ones are ignored."""
        with self._lock:
            # Longest first: one may be part of another.
            texts = {*self._texts, *filter(None, secrets)}
            self._texts = tuple(sorted(texts, key=len, reverse=True))

    def redact(self, text: str) -> str:
        """Return a message of a server, which may echo secrets, with `[key]` in their place."""
        for secret in self._texts:
            text = text.replace(secret, _REDACTED)
        return text

    def redact_json(self, value: Any, *, may_be_cut: bool = False) -> Any:
        """Return a JSON value with `[key]` in place of every secret; keys of objects stay.

        A secret may be spread over the texts of a list. With `may_be_cut` the first half or more of
        one, where a text ends, is replaced too, unless the secret has less than 16 characters.
        Secrets of less than 8 stay: they may be words of a conversation.
        """
        # Replace in the parsed value: in JSON text, escapes could hide a secret.
        if isinstance(value, str):
            return self._redact_pieces([value], may_be_cut)[0]
        if isinstance(value, dict):
            return {
                key: self.redact_json(item, may_be_cut=may_be_cut) for key, item in value.items()
            }
        if isinstance(value, list):
            is_text = all(isinstance(item, str) for item in value)
            items = self._redact_pieces(value, may_be_cut) if is_text else value
            return [self.redact_json(item, may_be_cut=may_be_cut) for item in items]
        return value

    def appear_in(self, text: str) -> bool:
        """Return whether a text has a secret, or its beginning where the text is cut off.

        Secrets of less than 16 characters are not looked for.
        """
        return any(
            secret in text or _cut_length(secret, text, least=_RECOGNISED)
            for secret in self._texts
            if len(secret) >= _MIN_REFUSED
        )

    def _redact_pieces(self, pieces: list[str], may_be_cut: bool) -> list[str]:
        """Return the pieces of a text, each secret replaced in the piece where it begins."""
        text = "".join(pieces)
        places = self._find(text, may_be_cut)
        if not places:
            return pieces
        shown = list(text)
        for start, end in places:
            shown[start:end] = [_REDACTED, *[""] * (end - start - 1)]
        edges = accumulate(map(len, pieces), initial=0)
        return ["".join(shown[start:end]) for start, end in pairwise(edges)]

    def _find(self, text: str, may_be_cut: bool) -> list[tuple[int, int]]:
        """Return the places of secrets in a text, in order; those that overlap are one place."""
        matches: list[tuple[int, int]] = []
        for secret in self._texts:
            if is_secret(secret) and secret[:_RECOGNISED] in text:
                matches += [match.span() for match in re.finditer(re.escape(secret), text)]
                if may_be_cut and len(secret) >= _MIN_REFUSED:
                    # Less than half may be a word, as of a password of several words.
                    cut = _cut_length(secret, text, least=(len(secret) + 1) // 2)
                    matches += [(len(text) - cut, len(text))] if cut else []
        places: list[tuple[int, int]] = []
        for start, end in sorted(matches):
            if places and start < places[-1][1]:
                before = places.pop()
                start, end = before[0], max(end, before[1])
            places.append((start, end))
        return places


def _cut_length(secret: str, text: str, *, least: int) -> int:
    """Return how many of a secret's first characters a text ends in; 0 for less than `least`."""
    ends = range(len(secret) - 1, least - 1, -1)
    return next((end for end in ends if text.endswith(secret[:end])), 0)


class Ledger(Closeable):
    """Counts what is sent to the large model and can write every request body to a file.

    `LargeModel` reports each request to its ledger before it sends the body. The file has one JSON
    object per line: `time`, `url`, `bytes` and `body`. A body that cannot be written is not sent:
    after the first failed write, every later request is refused. Methods may be called from
    several threads.

        with Ledger(Path("sent.jsonl")) as ledger, LargeModel(url, ledger=ledger) as large:
            ...

    Args:
        path: File to append to. It is created, readable by its owner only, if it does not exist.
            None (default) counts without writing a file.
        now: Returns the current time in UTC, for the `time` of an entry. The system clock by
            default.

    Attributes:
        secrets: The texts that entries show as `[key]`; `LargeModel` adds its key and password.
        uploads: Totals of what has been sent since the ledger was made.
        failure: Why nothing more can be recorded or sent; None while the file can be written.

    Raises:
        UsageError: The file cannot be opened.
    """

    def __init__(
        self, path: Path | str | None = None, *, now: Callable[[], datetime] = _now
    ) -> None:
        self._path = path = None if path is None else Path(path)
        self._now = now
        self._lock = threading.Lock()
        self.secrets = Secrets()
        self._file = None if path is None else _open_private(path)
        self.uploads = Uploads()
        self.failure: str | None = None

    def raise_if_failed(self) -> None:
        """Raise LargeUnrecorded if an earlier entry could not be written."""
        if self.failure is not None:
            raise LargeUnrecorded(self.failure)

    def record_request(self, url: str, body: bytes) -> None:
        """Count and write a request body that is about to be sent, once per attempt.

        Raises LargeUnrecorded if it cannot be written; the body must then not be sent.
        """
        with self._lock:
            if self._file is not None:
                self._write(url, body)
            before = self.uploads
            self.uploads = replace(
                before, requests=before.requests + 1, size_bytes=before.size_bytes + len(body)
            )

    def record_usage(
        self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int
    ) -> None:
        """Count the tokens of an answered request; `cached_tokens` are part of `prompt_tokens`."""
        with self._lock:
            total = self.uploads + Uploads(
                tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=completion_tokens,
            )
            # A server may claim more cached tokens than the prompts had.
            exceeds_prompt = total.cached_tokens > total.tokens
            self.uploads = replace(total, cached_tokens=total.tokens) if exceeds_prompt else total

    def close(self) -> None:
        """Close the file, if there is one; requests after that are refused."""
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _write(self, url: str, body: bytes) -> None:
        assert self._file is not None
        if self.failure is None:
            line = memoryview(self._encode_entry(url, body))
            try:
                while line:
                    line = line[self._file.write(line) :]
            except (OSError, ValueError) as exc:
                # The file may end in half a line, which a later entry would continue.
                reason = (exc.strerror if isinstance(exc, OSError) else None) or "it is closed"
                self.failure = (
                    f"the ledger {self._path} cannot be written ({reason}); nothing more is sent"
                )
        self.raise_if_failed()

    def _encode_entry(self, url: str, body: bytes) -> bytes:
        text = body.decode("utf-8", errors="replace")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        entry = {
            "time": self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "url": url,
            "bytes": len(body),
            # A prompt ends with the answer so far, which may have begun to spell a secret.
            "body": self.secrets.redact_json(value, may_be_cut=True),
        }
        text = one_line_json(json.dumps(entry, ensure_ascii=False))
        return text.encode(errors="replace") + b"\n"


def _open_private(path: Path) -> Any:
    """Open a file for unbuffered appending; a new file is readable by its owner only."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its reader.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        handle = os.open(path, flags, 0o600)
        os.set_blocking(handle, True)
        if _ends_in_half_a_line(path):
            os.write(handle, b"\n")
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or "no such name"
        raise UsageError(
            f"the ledger {path} cannot be written ({reason}); choose another file",
            parameter="ledger",
        ) from exc
    return os.fdopen(handle, "ab", buffering=0)


def _ends_in_half_a_line(path: Path) -> bool:
    """Return whether an earlier run was stopped in the middle of an entry."""
    if not path.is_file() or not path.stat().st_size or not os.access(path, os.R_OK):
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
