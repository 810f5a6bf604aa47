"""What left the machine: running totals and, on request, every request body in a file."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxroute.closeable import Closeable
from mlxroute.errors import LargeUnrecorded, UsageError
from mlxroute.types import Uploads

_HIDDEN = "[key]"


def _now() -> datetime:
    return datetime.now(UTC)


class Ledger(Closeable):
    """Counts what is sent to the large model, and writes it to a file of JSON Lines if given one.

    `sent` is called as a body is about to leave, once per attempt, `used` as replies come. Safe to
    call from several threads. A body that cannot be written must not leave: once the file fails,
    `sent` raises for good. Raises UsageError when the file cannot be opened.
    """

    def __init__(self, path: Path | None = None, *, now: Callable[[], datetime] = _now) -> None:
        self._path = path
        self._now = now
        self._lock = threading.Lock()
        self._secrets: list[str] = []
        self._file = None if path is None else _opened(path)
        self.uploads = Uploads()
        self.failure: str | None = None

    def add_secret(self, secret: str | None) -> None:
        """Write `[key]` wherever this text occurs from now on."""
        if secret:
            # Longest first: one may be part of another.
            self._secrets = sorted({*self._secrets, secret}, key=len, reverse=True)

    def raise_if_failed(self) -> None:
        """Raise LargeUnrecorded when nothing may be sent any more."""
        if self.failure is not None:
            raise LargeUnrecorded(self.failure)

    def record_request(self, url: str, body: bytes) -> None:
        """Record a body that leaves now. Raises LargeUnrecorded when it must not."""
        with self._lock:
            if self._file is not None:
                self._write(url, body)
            so_far = self.uploads
            self.uploads = replace(
                so_far, requests=so_far.requests + 1, size_bytes=so_far.size_bytes + len(body)
            )

    def record_usage(
        self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int
    ) -> None:
        """Count tokens of a request that is answered; the cached ones are part of its prompt.

        Servers are not trusted to keep to that.
        """
        with self._lock:
            total = self.uploads + Uploads(
                tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=completion_tokens,
            )
            self.uploads = replace(total, cached_tokens=min(total.cached_tokens, total.tokens))

    def close(self) -> None:
        """Close the file; what would be sent after that is refused."""
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _write(self, url: str, body: bytes) -> None:
        assert self._file is not None
        if self.failure is None:
            line = memoryview(self._line(url, body))
            try:
                while line:
                    line = line[self._file.write(line) :]
            except (OSError, ValueError) as exc:
                # Half a line may stand there now: no later one can be trusted to be whole.
                reason = (exc.strerror if isinstance(exc, OSError) else None) or "it is closed"
                self.failure = (
                    f"the ledger {self._path} cannot be written ({reason}); nothing more is sent"
                )
        self.raise_if_failed()

    def _line(self, url: str, body: bytes) -> bytes:
        text = body.decode("utf-8", errors="replace")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        entry = {
            "time": self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "url": url,
            "bytes": len(body),
            "body": self._without_secrets(value),
        }
        return json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n"

    def _without_secrets(self, value: Any) -> Any:
        # In the parsed value, where no escape can disguise a secret.
        if isinstance(value, dict):
            return {
                self._without_secrets(key): self._without_secrets(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._without_secrets(item) for item in value]
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, _HIDDEN)
        return value


def _opened(path: Path) -> Any:
    """The file, for appending, each write going straight to the system; new ones are private."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or "no such name"
        raise UsageError(
            f"the ledger {path} cannot be written ({reason}); choose another --ledger FILE"
        ) from exc
    return os.fdopen(handle, "ab", buffering=0)
