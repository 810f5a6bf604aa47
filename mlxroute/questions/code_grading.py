"""Code in answers: the program that an answer gives, and whether it passes its tests."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
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
_FUTURE_IMPORT: Final = re.compile(
    r"^from[ \t]+__future__[ \t]+import\b(?:[ \t]*\([^)]*\))?.*\n?", re.MULTILINE
)
_TRIPLE_QUOTES: Final = ('"""', "'''")
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
            return _join(before, _dedent(block.code))
    if strict or not text.strip():
        return None
    if blocks or definition not in text:
        return function.start + (blocks[0].code if blocks else text)
    first_line = _FIRST_LINE_OF_CODE.search(text)
    return _join(before, _dedent(text[first_line.start() :] if first_line else text))


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
    lines = text.split("\n")
    begin = 0
    while begin < len(lines):
        opening = _OPENING_FENCE.match(lines[begin])
        begin += 1
        if opening:
            end, block = _read_block(lines, begin, fence=opening[1] or opening[2])
            blocks.append(block)
            begin = end
    return blocks


def _read_block(lines: Sequence[str], begin: int, *, fence: str) -> tuple[int, _CodeBlock]:
    """Return the block that begins at a line, and the number of the line after it.

    It ends at the first closing fence that is not within a docstring, else at the first.
    """
    closing = re.compile(rf"{fence[0]}{{{len(fence)},}}\s*$|^\s*{fence}(?!\w).*")
    blocks = [
        (number + 1, "\n".join([*lines[begin:number], lines[number][: end.start()]]))
        for number in range(begin, len(lines))
        if (end := closing.search(lines[number]))
    ]
    if not blocks:
        return len(lines), _CodeBlock("\n".join(lines[begin:]), is_closed=False)
    whole = (block for block in blocks if not _ends_in_string(block[1]))
    after, code = next(whole, blocks[0])
    return after, _CodeBlock(code, is_closed=True)


def _ends_in_string(code: str) -> bool:
    return any(code.count(quotes) % 2 for quotes in _TRIPLE_QUOTES)


def _join(before: str, code: str) -> str:
    """Return code after what comes before it, but with its `__future__` imports first."""
    future = "".join(match[0].rstrip("\n") + "\n" for match in _FUTURE_IMPORT.finditer(code))
    return future + before + _FUTURE_IMPORT.sub("", code)


def _dedent(code: str) -> str:
    """Remove the first line's indentation from all lines that have it.

    Unlike `textwrap.dedent`, this allows lines of a long string that are indented less.
    """
    lines = code.split("\n")
    first = next((line for line in lines if line.strip()), "")
    indentation = first[: len(first) - len(first.lstrip())]
    return "\n".join(line.removeprefix(indentation) for line in lines)
