"""UTF-8 bytes that may end inside a character."""

from __future__ import annotations


def decode_or_none(data: bytes) -> str | None:
    """Return the text of whole characters, None if the bytes begin or end inside one."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
