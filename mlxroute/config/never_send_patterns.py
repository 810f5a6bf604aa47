"""The never-send patterns of the settings and of the files they name."""

from __future__ import annotations

import re
import warnings

from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError, MlxRouteError
from mlxroute.untrusted_text import TextFile
from mlxroute.user_folders import expand_user

_MAX_FILE_BYTES = 2**20
# With one of them, such as the end of a line from Windows, a pattern would match no usual text.
_UNMATCHED = re.compile(r"[\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f]|\n\Z")


def read_never_send(settings: Settings) -> tuple[re.Pattern[str], ...]:
    r"""Return the compiled patterns of the settings, then those of their files, in order.

    A file has one pattern per row, which ends at `\n`; blank rows and rows that begin with `#` are
    ignored. Raises ConfigError with the pattern, or with the file and row of one that is read from
    a file.
    """
    patterns = [
        compile_pattern(text, where=f"never_send {text!r}", parameter="never_send")
        for text in settings.never_send
    ]
    for name in settings.never_send_file:
        file = TextFile(
            expand_user(name),
            "the never-send file",
            max_bytes=_MAX_FILE_BYTES,
            error=ConfigError,
        )
        patterns += _read_file(file)
    return tuple(patterns)


def compile_pattern(
    text: str,
    *,
    where: str,
    error: type[MlxRouteError] = ConfigError,
    parameter: str | None = None,
) -> re.Pattern[str]:
    """Return a compiled pattern.

    Raises `error`, with `where` in its text, for one that is not a regular expression, that ends in
    a line break, or that has control characters or the U+FFFD of bytes that are not UTF-8.
    """
    if (match := _UNMATCHED.search(text)) is not None:
        reason = f"the control character {match[0]!a}; leave it out, or write it as an escape"
        if match[0] == "\ufffd":
            reason = "bytes that are not UTF-8; write it in UTF-8"
        raise error(f"{where} has {reason}", parameter=parameter)
    try:
        with warnings.catch_warnings():
            # Python warns of set operations that it may understand one day.
            warnings.simplefilter("ignore")
            return re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        raise error(f"{where} is not a regular expression: {exc}", parameter=parameter) from exc


def _read_file(file: TextFile) -> list[re.Pattern[str]]:
    patterns = []
    for number, row in file.rows():
        text = row.strip()
        if "\r" in text:
            raise file.refuse("its lines end with a carriage return alone; save it with \\n")
        if text and not text.startswith("#"):
            # The error names the row only: the file's contents may be private.
            where = f"row {number} of the never-send file {file.path}"
            patterns.append(compile_pattern(text, where=where))
    return patterns
