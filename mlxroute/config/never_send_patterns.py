"""The never-send patterns of the settings and of the files they name."""

from __future__ import annotations

import re
from pathlib import Path

from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError


def read_never_send(settings: Settings) -> tuple[re.Pattern[str], ...]:
    """Return the compiled patterns of the settings, then those of their files, in order.

    A file has one pattern per line; blank lines and lines that begin with `#` are ignored. Raises
    ConfigError with the pattern, or with the file and line of one that is read from a file.
    """
    patterns = [
        _compile(text, where=f"never_send {text!r}", parameter="never_send")
        for text in settings.never_send
    ]
    for name in settings.never_send_file:
        patterns += _read_file(Path(name).expanduser())
    return tuple(patterns)


def _read_file(path: Path) -> list[re.Pattern[str]]:
    try:
        # With a byte order mark in it, the first pattern would never match.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or "it is not UTF-8 text"
        raise ConfigError(f"the never-send file {path} cannot be read: {reason}") from exc
    return [
        # The error names the line only: the file's contents may be private.
        _compile(
            line.strip(),
            where=f"line {number} of the never-send file {path}",
            parameter="never_send_file",
        )
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _compile(text: str, *, where: str, parameter: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ConfigError(
            f"{where} is not a regular expression: {exc}", parameter=parameter
        ) from exc
