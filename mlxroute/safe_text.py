"""Text from models and servers without characters that control a terminal or end a line."""

from __future__ import annotations

import re
import unicodedata

_CONTROLS = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),  # bidi embedding and override
    *range(0x2066, 0x206A),  # bidi isolates
)
# A lone surrogate, which JSON may carry, cannot be encoded for any stream.
_REPLACEMENTS = dict.fromkeys(_CONTROLS, "") | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")

# They shape the characters beside them: without them words of Persian and joined emoji fall apart.
_JOINERS = "\u200c\u200d"

# Python's `splitlines` ends a line at them too; JSON has them only inside strings.
_JSON_LINE_ENDS = re.compile("[\x85\u2028\u2029]")

_READ_PER_SHOWN = 20


def printable(text: str) -> str:
    """Return the text without control characters; newlines and tabs are kept."""
    return text.translate(_REPLACEMENTS)


def printable_line(text: str, *, limit: int = 300) -> str:
    """Return the text as one printable line of at most `limit` characters."""
    # The time must not grow with a text that is cut anyway.
    head = text[: _READ_PER_SHOWN * limit]
    line = "".join(c if c.isprintable() or c in _JOINERS else " " for c in head)
    line = re.sub(r"\s+", " ", line).strip()
    is_whole = len(head) == len(text) and len(line) <= limit
    return line if is_whole else line[: limit - 1] + "…"


def error_text(error: BaseException) -> str:
    """Return the message of an error as one printable line, or its class if it has none."""
    return printable_line(str(error)) or type(error).__name__


def os_error_text(error: OSError) -> str:
    """Return the system's words for an error, after the file that it is about if there is one."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def strip_secrets(text: str) -> str:
    """Remove the parts of a mistyped URL that may hold a secret: userinfo, query and fragment."""
    # Some characters that look like @ are one to a URL parser.
    ends = [n for n, c in enumerate(text, start=1) if "@" in unicodedata.normalize("NFKC", c)]
    if ends:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/*(?=[^/])", text[: ends[-1]])
        # Without slashes, what looks like a scheme may be the user.
        is_scheme = scheme is not None and scheme[0].endswith("/")
        text = (scheme[0] if scheme is not None and is_scheme else "") + text[ends[-1] :]
    return re.sub(r"([?#]).+", r"\1…", text, flags=re.DOTALL)


def one_line_json(json_text: str) -> str:
    """Return JSON of one line with escapes for what some readers take for the end of a line."""
    return _JSON_LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", json_text)
