"""One prompt in each of the forms that dialects take."""

from __future__ import annotations

from mlxroute.large.dialects import Dialect, dialect_named
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.types import Message

QUESTION: Message = {"role": "user", "content": "hi"}
IDS = Prompt(ids=(5, 6))
TEXT = Prompt(text="He")
CHAT = Prompt(messages=(QUESTION,), answer_start="He")


def dialect(name: str) -> Dialect:
    found = dialect_named(name)
    assert found is not None
    return found


def prompt_for(asked: Dialect) -> Prompt:
    return {PromptForm.IDS: IDS, PromptForm.TEXT: TEXT, PromptForm.CHAT: CHAT}[asked.form]
