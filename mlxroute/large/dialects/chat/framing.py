"""The chat that asks a server to go on with a partial answer: plainly, or by worked examples.

The last line or sentence of the answer so far is given to the model, which writes it again and goes
on. What the reply repeats shows where its new text begins, to the byte: inside a word, after a
space, after a line break.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.large.prompt import Prompt
from mlxroute.messages import fold_system
from mlxroute.types import Message

# Characters to repeat: shorter parts are repeated too often elsewhere, longer ones cost tokens.
_MIN_REPEATED: Final = 30
_MAX_REPEATED: Final = 200
# A line or sentence that is longer is cut at a word.
_WORD_SLACK: Final = 60
# The least that a reply must repeat if it begins after the beginning of the part.
_MIN_OVERLAP: Final = 8
# The last line of the answer may be shorter, as it has a clear beginning.
_MIN_LINE: Final = 4

_LINE: Final = re.compile(r"(?<=\n)(?=[^\n])")
_SENTENCE: Final = re.compile(
    r"(?<=[。！？])(?=\S)|(?:(?<=[^\W\d][.!?] )|(?<=[^\W\d][.!?][\"')] ))(?=\S)"
)
_WORD: Final = re.compile(r"(?<!\S)(?=\S)")
# One character, or all white space up to the next one.
_UNIT: Final = re.compile(r"\s+|\S")

_BEGIN_WITH: Final = "Begin your answer with"
_GO_ON_WITH: Final = "Go on with your answer. Begin with:\n"
_BEGIN, _END = "<beginning>", "</beginning>"
_INSTRUCTIONS: Final = (
    "Some answers are written in parts. The user gives the first characters of the next part. Begin"
    " your reply with exactly these characters, even where they end inside a word, a line or a"
    " block of code, and go on from there as the answer would have gone on: same language, same"
    " format, same line breaks and indentation. Add no greeting and no comment."
)
_ASK_FIRST: Final = "Write this beginning of the answer again:\n"
_ASK_NEXT: Final = "Write this beginning of the next part of the answer again:\n"
_ASK_LAST: Final = "\nThen go on from it."

# A question, the answer so far, and how it goes on.
_EXAMPLES: Final = (
    (
        "How do bees make honey?",
        "Bees collect nectar from flowers and carry it back to the hive. There other bees take it"
        " over and chew it until it thick",
        "ens. Then they spread it over the honeycomb to dry.",
    ),
    (
        "Write a Python function that adds up the even numbers of a list.",
        "```python\ndef sum_even(numbers):\n    total = 0\n    for number in numbers:\n"
        "        if number",
        " % 2 == 0:\n            total += number\n    return total\n```",
    ),
    ("水在什么温度下沸腾？", "在标准大气压下，水在一百摄氏", "度时沸腾。"),
    (
        "Name three rivers in Europe.",
        "1. The Danube, which flows through ten countries.\n2. The Rhine, which rises in the Swiss"
        " Alps.\n",
        "3. The Volga, which is the longest of them.",
    ),
    (
        "Why do leaves turn red in autumn?",
        "In autumn the days get shorter, and trees stop making chlorophyll. This green",
        " pigment hides the other colours in summer. Without it, red and yellow ones appear.",
    ),
)

# An answer ends only after one of these, outside a block of code: a model may stop too early.
_LAST: Final = re.compile(r"[.!?…。！？»”\"')\]*`~\u2600-\u27bf\ufe0f\U0001f000-\U0001faff]\s*\Z")
_FENCE: Final = re.compile(r"^ *(?:```|~~~)", re.MULTILINE)

# Tokens for each character of a kind, rather too many.
_TOKENS: Final = (
    (re.compile(r"[A-Za-z]"), 0.3),
    (re.compile(r"\s"), 0.25),
    (re.compile(r"[0-9]"), 1.0),
    (re.compile(r"[\x21-\x7e]"), 0.7),
    (re.compile(r"[\x80-\uffff]"), 1.3),
)
_TOKENS_PER_OTHER: Final = 4.0


@dataclass(frozen=True, slots=True)
class Framing:
    """The messages of a request, and the end of the answer so far that the reply repeats."""

    messages: tuple[Message, ...]
    repeated: str

    @property
    def repeated_tokens(self) -> int:
        """An upper estimate of the tokens of `repeated` in any vocabulary."""
        return math.ceil(sum(map(_token_estimate, self.repeated)))


def frame(prompt: Prompt, *, shows_examples: bool = False) -> Framing:
    """Return the chat for a prompt. The question of an answer that has not begun is all of it.

    With worked examples, the instructions and the system message begin user messages: some chat
    templates refuse system messages.
    """
    answer = prompt.answer_start
    if not answer:
        return Framing(prompt.messages, "")
    if not shows_examples:
        turns, repeated = _ask(prompt.messages, answer, marked=False)
        return Framing(tuple(turns), repeated)
    turns, repeated = _ask(fold_system(prompt.messages), answer, marked=True)
    return Framing((*_BEGINNING, *turns), repeated)


def repeated_size(prompt: Prompt, reply: str) -> int | None:
    """Return how many characters of a reply repeat the answer so far; None if it does not go on.

    White space at its beginning and copies of the request's marks before the part count too. White
    space inside the part may differ, and a reply may begin later than asked for, but not with text
    that only happens to be alike. All of a reply that is too short for its part is repeated.
    """
    answer = prompt.answer_start
    part = _last_part(answer)
    # Some models and chat templates put white space before every answer.
    blank = 0 if part.isspace() else len(reply) - len(reply.lstrip())
    if not answer:
        return blank
    size = _repeated_size(answer, part, reply)
    if size is None and blank:
        size = _repeated_size(answer, part, reply[blank:])
        return None if size is None else blank + size
    return size


def _repeated_size(answer: str, part: str, reply: str) -> int | None:
    """Return the size for a reply that has no white space of its own at its beginning."""
    copied = _copied_marks(part, reply)
    text = reply[copied:]
    size = _match(part, text)
    if size is None:
        shorter = range(len(part) - 1, min(_MIN_OVERLAP, len(part)) - 1, -1)
        size = next((count for count in shorter if text[:count] == answer[-count:]), None)
    if size is None:
        line = answer.rpartition("\n")[2]
        size = _match(line, text) if len(line.strip()) >= _MIN_LINE else None
    if size is None:
        return None
    rest = text[size:]
    # A copy of the mark after the part is not text of the answer.
    return None if rest and _END.startswith(rest[: len(_END)]) else copied + size


def _copied_marks(part: str, reply: str) -> int:
    """Return the length of what a reply copies from the request before the part itself."""
    if part.startswith((_ASK_NEXT, _ASK_FIRST, _BEGIN)):
        return 0
    marks = (ask + _BEGIN for ask in (_ASK_NEXT, _ASK_FIRST, ""))
    return next((len(mark) for mark in marks if reply.startswith(mark)), 0)


def _match(part: str, text: str) -> int | None:
    """Return how many characters of `text` repeat `part`, all if it is too short, else None.

    White space is compared exactly at the end of the part, where the answer goes on.
    """
    body, end = part.strip(), part[len(part.rstrip()) :]
    size = len(text) - len(text.lstrip()) if body and part[0].isspace() else 0
    units = _UNIT.finditer(text, size)
    for expected in _UNIT.findall(body):
        if (unit := next(units, None)) is None:
            return len(text)
        if unit[0] != expected and not (unit[0].isspace() and expected.isspace()):
            return None
        size = unit.end()
    rest = text[size:]
    if rest.startswith(end):
        return size + len(end)
    return len(text) if end.startswith(rest) else None


def may_end(answer: str) -> bool:
    """Return whether an answer may end here: after a sentence or a block of code."""
    return bool(_LAST.search(answer)) and len(_FENCE.findall(answer)) % 2 == 0


def _ask(messages: Sequence[Message], answer: str, *, marked: bool) -> tuple[list[Message], str]:
    """Return the conversation with the answer so far and the question to go on; and the part."""
    part = _last_part(answer)
    before = answer[: len(answer) - len(part)]
    turns = [dict(message) for message in messages]
    first = f"{_ASK_FIRST}{_marked(part)}" if marked else _begin_with(part)
    if before.strip():
        following = f"{_ASK_NEXT}{_marked(part)}" if marked else _GO_ON_WITH + part
        turns.append({"role": "assistant", "content": before})
        turns.append({"role": "user", "content": following})
    elif turns and turns[-1]["role"] == "user":
        turns[-1]["content"] += f"\n\n{first}"
    else:
        turns.append({"role": "user", "content": first})
    return turns, part


def _marked(part: str) -> str:
    return f"{_BEGIN}{part}{_END}{_ASK_LAST}"


def _begin_with(part: str) -> str:
    """Return the plain request for a whole answer that begins with `part`."""
    # Quoted words are gone on with more often as the model itself would; lines need their breaks.
    is_quotable = "\n" not in part and '"' not in part
    return f'{_BEGIN_WITH} "{part}"' if is_quotable else f"{_BEGIN_WITH}:\n{part}"


def _last_part(answer: str) -> str:
    """Return the last lines or sentences of an answer, or its last words where these are long."""
    end = len(answer.rstrip())
    if end <= _MIN_REPEATED:
        return answer
    levels = (
        ((_LINE, _SENTENCE), _MAX_REPEATED),
        ((_WORD,), _MIN_REPEATED + _WORD_SLACK),
    )
    tail = max(0, end - _MAX_REPEATED - 1)
    for patterns, most in levels:
        starts = [0, *(match.start() for p in patterns for match in p.finditer(answer, tail))]
        fitting = [start for start in starts if _MIN_REPEATED <= end - start <= most]
        if fitting:
            return answer[max(fitting) :]
    return answer[end - _MIN_REPEATED :]


def _token_estimate(character: str) -> float:
    rates = (rate for pattern, rate in _TOKENS if pattern.match(character))
    return next(rates, _TOKENS_PER_OTHER)


def _worked_examples() -> Iterator[Message]:
    for question, answer, rest in _EXAMPLES:
        turns, part = _ask([{"role": "user", "content": question}], answer, marked=True)
        yield from turns
        yield {"role": "assistant", "content": part + rest}


HIDDEN: Final = (
    _BEGIN,
    _END,
    *(part.strip() for part in (_ASK_FIRST, _ASK_NEXT, _ASK_LAST, _BEGIN_WITH, _GO_ON_WITH)),
    # Later parts of the plain requests that few answers have for reasons of their own.
    "answer with:",
    'nswer with "',
    "answer. Begin with:",
    *re.split(r"(?<=\.) ", _INSTRUCTIONS),
)
"""The texts of the framing, which a reply must not repeat."""
_BEGINNING: Final = tuple(
    fold_system([{"role": "system", "content": _INSTRUCTIONS}, *_worked_examples()])
)
"""The fixed beginning of requests with examples, so that a provider's prompt cache can hold it."""
