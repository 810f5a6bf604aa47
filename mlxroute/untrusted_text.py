"""The one way in for text from outside: files, their rows, and JSON and TOML in them.

A text is UTF-8, with or without a byte order mark. What is too large, is not text, or does not
arrive in time is refused with one line that names the file and, where there is one, the row.
"""

from __future__ import annotations

import io
import json
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from mlxroute.errors import MlxRouteError, UsageError

MAX_ROW_BYTES: Final = 16 * 2**20
_CHUNK_BYTES: Final = 2**20
# Values nested deeper would exceed Python's recursion limit in those who read them.
_MAX_DEPTH: Final = 100
# The time to parse a dotted key is quadratic in its parts.
_MAX_KEY_PARTS: Final = 1000
# A pipe that nobody writes to never ends.
_PIPE_LIMIT_S: Final = 10.0
_MAX_PIPE_BYTES: Final = 64 * 2**20
_BYTE_ORDER_MARK: Final = "\ufeff"
# UTF-32 first: its little-endian mark starts with that of UTF-16.
_OTHER_ENCODINGS: Final = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class MalformedText(ValueError):
    """Raised for what should be text, JSON or TOML and is not; the message is the reason."""


def _read_at_most(stream: BinaryIO, size: int) -> bytes:
    """Return the rest of a stream, at most `size` bytes, without memory for all of these first."""
    parts: list[bytes] = []
    while size and (part := stream.read(min(size, _CHUNK_BYTES))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class TextFile:
    """A text file from outside, and the errors for one that cannot be used.

    Args:
        path: The file; a pipe or device is read for at most ten seconds.
        description: What the file is, with an article, as in `the config file`.
        max_bytes: Size above which it is refused.
        error: Class of the errors. UsageError by default.
        parameter: Name of the argument that gave the path; None (default) for none.
    """

    path: Path
    description: str
    max_bytes: int
    error: type[MlxRouteError] = UsageError
    parameter: str | None = None

    def read(self) -> str:
        """Return the text of the file, without a byte order mark. Raises `error`."""
        with self._open() as stream, self._read_errors():
            data = _read_at_most(stream, self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise self._too_large(self.max_bytes)
        return self._decode(data)

    def rows(self) -> Iterator[tuple[int, str]]:
        r"""Yield the number of each row, from 1, and its text, without `\n` or `\r\n` at its end.

        Rows end at `\n` only. Raises `error`.
        """
        with self._open() as stream:
            number = size = 0
            while data := self._read_row(stream, number + 1):
                number, size = number + 1, size + len(data)
                if size > self.max_bytes:
                    raise self._too_large(self.max_bytes)
                yield number, self._decode(data.removesuffix(b"\n"), row=number).removesuffix("\r")

    def refuse(self, reason: str, *, row: int | None = None) -> MlxRouteError:
        """Return the error for a file, or for one of its rows, that cannot be used."""
        if row is None:
            text = f"{self.description} {self.path} cannot be read: {reason}"
        else:
            text = f"{self.path}, row {row}: {reason}"
        return self.error(text, parameter=self.parameter)

    def _open(self) -> BinaryIO:
        with self._read_errors():
            # Without O_NONBLOCK, opening a pipe waits for its writer.
            handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode):
                if status.st_size > self.max_bytes:
                    raise self._too_large(self.max_bytes)
                return os.fdopen(os.dup(handle), "rb")
            with self._read_errors():
                return io.BytesIO(self._read_pipe(handle))
        finally:
            os.close(handle)

    def _read_pipe(self, handle: int) -> bytes:
        """Return what a pipe or device holds, as it is written."""
        parts: list[bytes] = []
        size, limit = 0, min(self.max_bytes, _MAX_PIPE_BYTES)
        ends_s = time.monotonic() + _PIPE_LIMIT_S
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while size <= limit:
            if not poll.poll(1000 * max(0.0, ends_s - time.monotonic())):
                raise self.refuse(f"its end did not come within {_PIPE_LIMIT_S:g} seconds")
            part = os.read(handle, _CHUNK_BYTES)
            if not part:
                break
            parts.append(part)
            size += len(part)
        if size > limit:
            raise self._too_large(limit)
        return b"".join(parts)

    def _read_row(self, stream: BinaryIO, number: int) -> bytes:
        with self._read_errors():
            data = stream.readline(MAX_ROW_BYTES + 1)
        if len(data) > MAX_ROW_BYTES:
            limit = f"{MAX_ROW_BYTES // 2**20} MiB"
            raise self.refuse(f"it is longer than {limit}", row=number)
        return data

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as exc:
            raise self.refuse(_reason(exc)) from exc

    def _decode(self, data: bytes, *, row: int | None = None) -> str:
        try:
            return decode_text(data)
        except MalformedText as exc:
            raise self.refuse(str(exc), row=row) from exc

    def _too_large(self, limit_bytes: int) -> MlxRouteError:
        kib = limit_bytes // 1024
        return self.refuse(
            f"it is larger than {f'{kib // 1024} MiB' if kib > 1023 else f'{kib} KiB'}"
        )


def decode_text(data: bytes) -> str:
    """Return UTF-8 bytes as text, without a byte order mark. Raises MalformedText."""
    for mark, name in _OTHER_ENCODINGS:
        if data.startswith(mark):
            raise MalformedText(f"it is {name} text; save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise MalformedText("it is not UTF-8 text") from exc
    if "\0" in text:
        raise MalformedText("it has NUL characters, so it is not text")
    # Joined files have one where a file began.
    return text.lstrip(_BYTE_ORDER_MARK)


def check_piped_text(text: str) -> str:
    """Return text of standard input without a byte order mark. Raises MalformedText.

    Bytes that are not UTF-8 were replaced when it was decoded, as a diff may hold some.
    """
    if "\0" in text:
        raise MalformedText("it has NUL characters, as UTF-16 text has; convert it to UTF-8")
    return text.lstrip(_BYTE_ORDER_MARK)


def parse_json(text: str, *, strict: bool = True, unique_keys: bool = True) -> Any:
    """Return the value of a JSON text. Raises MalformedText.

    Values nested more than 100 deep are refused. So is a key that appears twice unless
    `unique_keys` is False, and NaN, infinities and lone surrogates unless `strict` is False; Python
    writes them.
    """
    constant = _refuse_constant if strict else None
    hook = _object if unique_keys else None
    try:
        value = json.loads(text, parse_constant=constant, object_pairs_hook=hook)
    except json.JSONDecodeError as exc:
        # Some of its messages end in a colon or in "at".
        reason = exc.msg.rstrip(": ").removesuffix(" at")
        line = f"line {exc.lineno}, " if "\n" in text else ""
        raise MalformedText(f"not valid JSON ({reason} at {line}column {exc.colno})") from exc
    except RecursionError as exc:
        raise MalformedText(_too_deep()) from exc
    except MalformedText:
        raise
    except ValueError as exc:
        # Python limits the digits of an integer.
        raise MalformedText("not valid JSON (a number has too many digits)") from exc
    if "\\u" in text or text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_json(value, strict=strict)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text. Raises MalformedText."""
    import tomllib

    if any(line.partition("=")[0].count(".") > _MAX_KEY_PARTS for line in text.split("\n")):
        raise MalformedText(f"a key in it has more than {_MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise MalformedText(f"not valid TOML ({exc})") from exc
    except RecursionError as exc:
        raise MalformedText(_too_deep()) from exc
    except (ValueError, OverflowError) as exc:
        raise MalformedText("not valid TOML (a number has too many digits)") from exc


def _refuse_constant(name: str) -> Any:
    raise MalformedText(f"not valid JSON ({name} is not a JSON number)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise MalformedText(f"the key {name[:50]!r} appears twice")
        value[name] = item
    return value


def _check_json(value: Any, *, strict: bool) -> None:
    """Raise MalformedText for lone surrogates and for values that are nested too deeply."""
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise MalformedText(_too_deep())
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif strict and isinstance(item, str) and not _is_encodable(item):
                raise MalformedText("a text in it has half a surrogate pair")
        level, depth = below, depth + 1


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> str:
    return f"its values are nested more than {_MAX_DEPTH} deep"


def _reason(exc: OSError | ValueError) -> str:
    if isinstance(exc, OSError):
        return exc.strerror or type(exc).__name__
    return "its name has a NUL character"
