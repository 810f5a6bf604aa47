"""A terminal that records what is written to it."""

from __future__ import annotations

import io
import re
import unicodedata

from rich.console import Console

_ESCAPE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


class Terminal:
    """A terminal that interprets rich's live display and rejects any other control sequence."""

    def __init__(self, *, width: int, term: str = "xterm-256color", no_color: bool = False) -> None:
        self.stream = io.StringIO()
        environ = {"TERM": term} | ({"NO_COLOR": "1"} if no_color else {})
        self.console = Console(
            file=self.stream,
            force_terminal=True,
            color_system="truecolor",
            width=width,
            height=25,
            _environ=environ,
        )

    @property
    def raw(self) -> str:
        return self.stream.getvalue()

    @property
    def cursor_is_shown(self) -> bool:
        return self.raw.rfind("\x1b[?25h") >= self.raw.rfind("\x1b[?25l")

    def lines(self) -> list[str]:
        """Return the lines of the screen and its history, without blank lines at the end."""
        lines, row, at, raw = [""], 0, 0, self.raw
        while at < len(raw):
            char = raw[at]
            at += 1
            if char == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif char == "\x1b":
                match = _ESCAPE.match(raw, at - 1)
                assert match, f"unexpected escape sequence at {raw[at - 1 : at + 8]!r}"
                at = match.end()
                row -= self._obey(match, lines, row)
            elif char != "\r":
                assert unicodedata.category(char) != "Cc", f"control character {char!r}"
                lines[row] += char
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def _obey(self, match: re.Match[str], lines: list[str], row: int) -> int:
        match match.groups():
            case ("", count, "A"):
                return int(count)
            case ("", "2", "K"):
                lines[row] = ""
            case ("", _, "m") | ("?", "25", "h" | "l"):
                pass
            case unknown:
                raise AssertionError(f"unexpected control {unknown}")
        return 0
