"""Ollama's native `/api/generate` in raw mode: text in, text and logprobs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import RequestOptions
from mlxroute.large.dialects.json_fields import counted, ended, named_entry, sequence, string
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken


class OllamaGenerate:
    """Its `/v1/completions` applies the chat template and drops logprobs; this route does not."""

    name: Final = "Ollama generate"
    rung: Final = 2
    form: Final = PromptForm.TEXT
    path: Final = "/api/generate"
    at_root: Final = True
    names_model: Final = True
    crashes_on_cached_prompts: Final = False

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens; a prompt beyond the context is an error, not cut."""
        body: dict[str, object] = {
            "prompt": prompt.text,
            "raw": True,
            "stream": False,
            "truncate": False,
            "logprobs": True,
            "top_logprobs": ask.top_logprobs,
            "options": {"num_predict": ask.max_tokens, "temperature": 0, "repeat_penalty": 1.0},
        }
        return body if ask.model is None else body | {"model": ask.model}

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand a reply. The end of the answer has no logprobs, a lost fragment neither."""
        text = string(reply.get("response"), what="response")
        named = sequence(reply.get("logprobs") or [], what="logprobs")
        entries = [named_entry(item) for item in named]
        if not entries:
            if text:
                raise LargeProtocolError("the reply has text and no logprobs")
            entries = [ReplyPosition(ReplyToken(text=""))]
        if reply.get("done_reason") == "stop":
            if text:
                entries.append(ReplyPosition(ReplyToken(text="")))
            entries = list(ended(entries))
        return Completion(
            tuple(entries),
            text,
            **counted(reply.get("prompt_eval_count"), None, reply.get("eval_count")),
        )
