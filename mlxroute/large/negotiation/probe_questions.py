"""Questions whose answers are known: what any model says through a server that tells the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.vocabulary.token_sources import TokenSource
from mlxroute.types import Message


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """`begun` is continued with `expected`; `request` is what a chat is asked to get there."""

    begun: str
    expected: str
    request: str

    def prompt(self, form: PromptForm, tokens: TokenSource | None) -> Prompt | None:
        """The question in a form; None where ids are wanted and nothing gives them."""
        match form:
            case PromptForm.IDS:
                return None if tokens is None else Prompt(ids=tokens.encode(self.begun))
            case PromptForm.TEXT:
                return Prompt(text=self.begun)
            case PromptForm.CHAT:
                asked: Message = {"role": "user", "content": self.request}
                return Prompt(messages=(asked,), answer_start=self.begun)


MID_WORD: Final = (
    ProbeQuestion(
        "pineapple pineapple pineapple pineapple pineapple pine",
        "apple",
        "Write the word pineapple ten times, separated by spaces.",
    ),
    ProbeQuestion(
        "Monday, Tuesday, Wednesday, Thurs",
        "day",
        "List the seven days of the week, separated by commas.",
    ),
    ProbeQuestion(
        "butterfly butterfly butterfly butterfly butterfly butter",
        "fly",
        "Write the word butterfly ten times, separated by spaces.",
    ),
)
TRAILING_SPACE: Final = (
    ProbeQuestion(
        "1, 2, 3, 4, 5, 6, ", "7", "Count from 1 to 20, separated by a comma and a space."
    ),
    ProbeQuestion("1 2 3 4 5 6 7 8 ", "9", "Count from 1 to 20, separated by spaces."),
)
MULTI_BYTE: Final = (
    ProbeQuestion(
        "漢字漢字漢字漢字漢字漢字漢字漢", "字", "Write 漢字 twenty times without spaces."
    ),
    ProbeQuestion("café café café café café café caf", "é", "Write the word café ten times."),
    ProbeQuestion("ありがとう ありがとう ありがとう ありが", "とう", "Write ありがとう ten times."),
)
COUNTING: Final = ProbeQuestion(
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,", " 12", "Count from 1 to 30, separated by commas."
)
# Asked for many tokens at a time, for the sake of the names that the reply gives them.
MANY_TOKENS: Final = (MID_WORD[1], COUNTING, *MULTI_BYTE)
SHORT_ANSWER: Final[tuple[Message, ...]] = (
    {"role": "user", "content": "Answer with one word. What colour is grass?"},
    {"role": "assistant", "content": "Green"},
    {"role": "user", "content": "Answer with one word. What colour is snow?"},
    {"role": "assistant", "content": "White"},
    {"role": "user", "content": "Answer with one word. What colour is blood?"},
)
SHORT_ANSWER_TOKENS: Final = 24
"""A chat whose answer is over after a word or, from a talkative model, a sentence."""
