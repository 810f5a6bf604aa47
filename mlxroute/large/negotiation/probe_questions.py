"""Questions for probing a server: texts that nearly every model continues in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.vocabulary.token_sources import TokenSource
from mlxroute.types import Message


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """A text that a model should continue with `expected`.

    A chat is asked `chat_request`, and `text` is the start of its answer.
    """

    text: str
    expected: str
    chat_request: str

    def prompt(self, form: PromptForm, tokens: TokenSource | None) -> Prompt | None:
        """Return the prompt in this form; None if it needs token ids and `tokens` is None."""
        match form:
            case PromptForm.IDS:
                return None if tokens is None else Prompt(ids=tokens.encode(self.text))
            case PromptForm.TEXT:
                return Prompt(text=self.text)
            case PromptForm.CHAT:
                message: Message = {"role": "user", "content": self.chat_request}
                return Prompt(messages=(message,), answer_start=self.text)


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
"""The text ends inside a word."""
TRAILING_SPACE: Final = (
    ProbeQuestion(
        "1, 2, 3, 4, 5, 6, ", "7", "Count from 1 to 20, separated by a comma and a space."
    ),
    ProbeQuestion("1 2 3 4 5 6 7 8 ", "9", "Count from 1 to 20, separated by spaces."),
)
"""The text ends with a space, which some servers remove."""
MULTI_BYTE: Final = (
    ProbeQuestion(
        "漢字漢字漢字漢字漢字漢字漢字漢", "字", "Write 漢字 twenty times without spaces."
    ),
    ProbeQuestion("café café café café café café caf", "é", "Write the word café ten times."),
    ProbeQuestion("ありがとう ありがとう ありがとう ありが", "とう", "Write ありがとう ten times."),
)
"""The next character takes several bytes, and often several tokens."""
TOKENS_FOR_NEXT_CHARACTER: Final = 4
"""Enough for the next character: a token for each of its 3 bytes at most, and one for a space."""
COUNTING: Final = ProbeQuestion(
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,", " 12", "Count from 1 to 30, separated by commas."
)
MANY_TOKENS: Final = (MID_WORD[1], COUNTING, *MULTI_BYTE)
"""Continued with many tokens, for the vocabulary pieces that the replies name."""
SHORT_ANSWER: Final[tuple[Message, ...]] = (
    {"role": "user", "content": "Answer with one word. What colour is grass?"},
    {"role": "assistant", "content": "Green"},
    {"role": "user", "content": "Answer with one word. What colour is snow?"},
    {"role": "assistant", "content": "White"},
    {"role": "user", "content": "Answer with one word. What colour is blood?"},
)
"""A chat whose answer ends after a word or, from a talkative model, after a sentence."""
SHORT_ANSWER_TOKENS: Final = 24
