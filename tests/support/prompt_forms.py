"""A prompt in each form that dialects accept."""

from __future__ import annotations

from mlxroute.large.dialects import Dialect, get_dialect
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.types import Message

QUESTION: Message = {"role": "user", "content": "hi"}
IDS = Prompt(ids=(5, 6))
TEXT = Prompt(text="He")
CHAT = Prompt(messages=(QUESTION,), answer_start="He")


def dialect(name: str) -> Dialect:
    known = get_dialect(name)
    assert known is not None
    return known


def prompt_for(dialect: Dialect) -> Prompt:
    return {PromptForm.IDS: IDS, PromptForm.TEXT: TEXT, PromptForm.CHAT: CHAT}[dialect.form]
