"""The reason in a server's log why it ended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mlxroute.safe_text import printable_line

_TAIL_BYTES: Final = 16384
# A line of llama.cpp's log: time, level, then the function and the message.
_LLAMA_ERROR = re.compile(r"[\d.]+ E (.*)")
_EXCEPTION_NAME = re.compile(r"^(?:\w+\.)*[A-Z]\w*: ")


def failure_reason(log_path: Path) -> str:
    """Return llama.cpp's first error in a log, else the last message; "" if there is none.

    Later errors of llama.cpp only repeat that loading failed. The class name of an exception is
    left out.
    """
    try:
        with log_path.open("rb") as stream:
            stream.seek(max(0, log_path.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        if match := _LLAMA_ERROR.fullmatch(line):
            return printable_line(match[1])
    messages = [line for line in lines if line.strip() and not line.startswith((" ", "BLAS:"))]
    return printable_line(_EXCEPTION_NAME.sub("", messages[-1])) if messages else ""
