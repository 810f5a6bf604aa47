"""Code in answers: the program that an answer gives, and whether it passes its tests."""

from __future__ import annotations

import functools
import re
from typing import Final

from mlxroute.questions.code_sandbox import run_program
from mlxroute.questions.question_files import FunctionTask

_CLOSED_BLOCK: Final = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_BLOCK: Final = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_KEPT_RESULTS: Final = 4096


def extract_program(function: FunctionTask, text: str, *, strict: bool) -> str | None:
    """Return the program that an answer gives; None if it gives none.

    The strict form is a code block with the whole function. Otherwise the function may also be in
    a block that is not closed or outside of blocks, and a block or text without it continues the
    start of the function.
    """
    definition = f"def {function.name}("
    before = function.start[: function.start.index(definition)]
    blocks: list[str] = (_CLOSED_BLOCK if strict else _BLOCK).findall(text)
    for block in blocks:
        if definition in block:
            return before + block
    if strict or not text.strip():
        return None
    code = blocks[0] if blocks else text
    return before + code if definition in code else function.start + code


def passes(function: FunctionTask, program: str) -> bool:
    """Return whether a program passes the tests of a function. Raises UsageError as `run_program`.

    The program is run in isolation; equal ones are run once.
    """
    return _run(f"{program}\n\n{function.test}\n\ncheck({function.name})\n")


@functools.lru_cache(maxsize=_KEPT_RESULTS)
def _run(program: str) -> bool:
    return run_program(program)
