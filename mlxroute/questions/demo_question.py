"""The question of the demo, and whether an answer to it is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxroute.errors import UsageError
from mlxroute.untrusted_text import TextFile, parse_json

_CONCLUSION = re.compile(r"answer\s+is\b", re.IGNORECASE)
_BEFORE_CONCLUSION = re.compile(r"\A[\s:*`\"]+")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_WORD = re.compile(r"\w+")
_MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """The question of the demo, and the measurements that it was chosen from.

    Args:
        prompt: The user message, which asks for a conclusion "the answer is ...".
        answers: Accepted conclusions. Empty (default) if no answer can be called right or wrong.
        pair: Name of the pair of models that it was measured with. Empty by default.
        candidates: Number of questions that it was chosen from. 0 by default.
        small_wrong: Those of them that the small model alone answered wrong. 0 by default.
        corrected: Those of these that the routed answer got right. 0 by default.
        small_right: Candidates that the small model alone answered right. 0 by default.
        spoiled: Those of these that the routed answer did not get right. 0 by default.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    pair: str = ""
    candidates: int = 0
    small_wrong: int = 0
    corrected: int = 0
    small_right: int = 0
    spoiled: int = 0

    def judge(self, text: str) -> bool | None:
        """Return whether an answer is right; None if it has no conclusion or cannot be judged."""
        conclusion = find_conclusion(text)
        if conclusion is None or not self.answers:
            return None
        is_denied = _words(conclusion)[:1] == ["not"]
        return not is_denied and any(_contains(conclusion, answer) for answer in self.answers)


def read_demo_question(path: Path) -> DemoQuestion:
    """Return the question of a JSON file. Raises UsageError, naming the file, for a wrong one."""
    file = TextFile(path, "the question file", max_bytes=_MAX_FILE_BYTES)
    text = file.read()
    try:
        row = parse_json(text)
        return DemoQuestion(
            prompt=f"{row['question']} {row['instruction']}",
            answers=tuple(row["answers"]),
            pair=row["pair"],
            candidates=row["candidates"],
            small_wrong=row["small_wrong"],
            corrected=row["corrected"],
            small_right=row["small_right"],
            spoiled=row["spoiled"],
        )
    except (ValueError, KeyError, TypeError) as exc:
        raise UsageError(f"{path} is not a question for the demo: {exc}") from exc


def find_conclusion(text: str) -> str | None:
    """Return the rest of the sentence after the last "answer is" of a text; None if there is none.

    Of a calculation, only what follows the last equals sign counts.
    """
    matches = list(_CONCLUSION.finditer(text))
    if not matches:
        return None
    sentence = _SENTENCE_END.split(_BEFORE_CONCLUSION.sub("", text[matches[-1].end() :]))[0]
    return sentence.rpartition("=")[2].strip(' .:*`"') or None


def _contains(text: str, answer: str) -> bool:
    """Return whether the words of an answer stand in a text, one after the other."""
    words, searched = _words(text), _words(answer)
    size = len(searched)
    return any(words[i : i + size] == searched for i in range(len(words) - size + 1))


def _words(text: str) -> Sequence[str]:
    return _WORD.findall(text.casefold())
