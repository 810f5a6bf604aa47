"""JSON Lines files that a long run appends to, also across interruptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> Iterator[Any]:
    """Yield the value of each line; nothing if the file does not exist.

    An incomplete last line, left by an interrupted run, is removed from the file.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    for line in complete.splitlines():
        yield json.loads(line)
