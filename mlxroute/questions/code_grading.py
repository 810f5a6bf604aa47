"""Code in answers: the program that an answer gives, and whether it passes its tests."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final

from mlxroute.questions.code_sandbox import run_program
from mlxroute.questions.question_files import FunctionTask

# A fence begins its line, after the mark of a list, or ends a line of text ("Here: ```python").
_OPENING_FENCE: Final = re.compile(
    r"[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}(?=[^`]*$)|~{3,})"
    r"|.*(?::[ \t]*|[ \t](?=`+\w))(`{3,})\w*[ \t]*$"
)
_FIRST_LINE_OF_CODE: Final = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?def[ \t]+\w+[ \t]*\(|import[ \t]+\w|from[ \t]+\S+[ \t]+import\b"
    r"|class[ \t]+\w+[ \t]*[(:]|@\w)",
    re.MULTILINE,
)
_KEPT_RESULTS: Final = 4096


@dataclass(frozen=True, slots=True)
class _CodeBlock:
    code: str
    is_closed: bool


def extract_program(function: FunctionTask, text: str, *, strict: bool) -> str | None:
    """Return the program that an answer gives; None if it gives none.

    The strict form is a closed code block with the whole function, the last one if there are
    several. Otherwise the function may also be in a block that is not closed or outside of blocks,
    and a block or text without it continues the start of the function.
    """
    definition = f"def {function.name}("
    before = function.start[: function.start.index(definition)]
    text = text.replace("\r\n", "\n")
    # A longer fence may surround other blocks.
    nested = [(block, *_find_code_blocks(block.code)) for block in _find_code_blocks(text)]
    blocks = [block for part in nested for block in part if block.is_closed or not strict]
    for block in reversed(blocks):
        if definition in block.code:
            return before + _dedent(block.code)
    if strict or not text.strip():
        return None
    if blocks or definition not in text:
        return function.start + (blocks[0].code if blocks else text)
    first_line = _FIRST_LINE_OF_CODE.search(text)
    return before + _dedent(text[first_line.start() :] if first_line else text)


def passes(function: FunctionTask, program: str) -> bool:
    """Return whether a program passes the tests of a function. Raises UsageError as `run_program`.

    The program is run in isolation; equal ones are run once.
    """
    return _run(f"{program}\n\n{function.test}\n\ncheck({function.name})\n")


@functools.lru_cache(maxsize=_KEPT_RESULTS)
def _run(program: str) -> bool:
    return run_program(program)


def _find_code_blocks(text: str) -> list[_CodeBlock]:
    """Return the fenced blocks of a Markdown text; the last one may lack its closing fence."""
    blocks: list[_CodeBlock] = []
    fence, lines = "", list[str]()
    for line in text.split("\n"):
        if not fence:
            opening = _OPENING_FENCE.match(line)
            fence = (opening[1] or opening[2]) if opening else ""
            lines = []
        elif end := re.search(rf"{fence[0]}{{{len(fence)},}}\s*$|^\s*{fence}(?!\w).*", line):
            lines.append(line[: end.start()])
            blocks.append(_CodeBlock("\n".join(lines), is_closed=True))
            fence = ""
        else:
            lines.append(line)
    if fence:
        blocks.append(_CodeBlock("\n".join(lines), is_closed=False))
    return blocks


def _dedent(code: str) -> str:
    """Remove the first line's indentation from all lines that have it.

    Unlike `textwrap.dedent`, this allows lines of a long string that are indented less.
    """
    lines = code.split("\n")
    first = next((line for line in lines if line.strip()), "")
    indentation = first[: len(first) - len(first.lstrip())]
    return "\n".join(line.removeprefix(indentation) for line in lines)
