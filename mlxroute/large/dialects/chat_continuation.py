"""`/v1/chat/completions` with an assistant turn that is begun and must be continued."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import ANSWER_AT_ONCE, RequestOptions
from mlxroute.large.dialects.json_fields import (
    counts,
    ended,
    first_choice,
    mapping,
    named_entry,
    sequence,
    string,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken


class Continue(Enum):
    """How a server is told to continue the last turn instead of closing it."""

    FLAGS = "flags"
    PREFIX = "prefix"
    TRAILING = "trailing turn"


class ChatContinuation:
    """One way of continuing a turn; `echoes` for servers whose reply repeats what was begun."""

    form: Final = PromptForm.CHAT
    path: Final = "/chat/completions"
    at_root: Final = False
    names_model: Final = True
    crashes_on_cached_prompts: Final = False

    def __init__(self, how: Continue, *, echoes: bool = False, logprobs: bool = True) -> None:
        self._how = how
        self._echoes = echoes
        self._logprobs = logprobs
        details = [how.value, *["echoing"] * echoes, *["text only"] * (not logprobs)]
        self.name = f"chat continuation ({', '.join(details)})"
        self.rung = 3 if logprobs else 4

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens; a turn of which nothing is written yet is not begun."""
        messages: list[dict[str, object]] = [dict(message) for message in prompt.messages]
        body: dict[str, object] = {
            "messages": messages,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
        }
        if prompt.answer_start:
            messages.append({"role": "assistant", "content": prompt.answer_start})
            if self._how is Continue.PREFIX:
                messages[-1]["prefix"] = True
            elif self._how is Continue.FLAGS:
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self._how is Continue.FLAGS:
            body |= ANSWER_AT_ONCE
        if self._logprobs:
            body |= {"logprobs": True, "top_logprobs": ask.top_logprobs}
        return body if ask.model is None else body | {"model": ask.model}

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply. A refusal or a tool call is no continuation."""
        choice = first_choice(reply)
        content = mapping(choice.get("message"), what="message").get("content")
        text = "" if content is None else string(content, what="message.content")
        if self._echoes and prompt.answer_start:
            if not text.startswith(prompt.answer_start):
                raise LargeProtocolError("the reply does not begin with the turn it continues")
            text = text[len(prompt.answer_start) :]
        logprobs = choice.get("logprobs")
        named = [] if logprobs is None else mapping(logprobs, what="logprobs").get("content") or []
        entries = [named_entry(item) for item in sequence(named, what="logprobs.content")]
        if self._logprobs and not entries and text:
            raise LargeProtocolError("the reply has text and no logprobs")
        if not entries:
            entries = [ReplyPosition(ReplyToken(text=text))]
        if choice.get("finish_reason") == "stop":
            if text and len(entries) == 1:
                entries.append(ReplyPosition(ReplyToken(text="")))
            entries = list(ended(entries))
        return Completion(tuple(entries), text, **counts(reply))
