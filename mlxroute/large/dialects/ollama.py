"""Ollama's native `/api/generate` in raw mode: text in, text and logprobs out."""

from __future__ import annotations

from collections.abc import Mapping

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import Dialect, RequestOptions, add_model
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_text,
    checked_counts,
    mark_end,
    parse_chat_position,
)
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken


class OllamaGenerate(Dialect):
    """The dialect of Ollama.

    Its `/v1/completions` is not used: it applies the chat template and drops logprobs.
    """

    name = "Ollama generate"
    rung = 2
    form = PromptForm.TEXT
    path = "/api/generate"
    at_root = True

    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Ask for greedy tokens; a prompt beyond the context is an error, not truncated."""
        body: dict[str, object] = {
            "prompt": prompt.text,
            "raw": True,
            "stream": False,
            "truncate": False,
            # A thinking model's text would be parsed, although `raw` skips its template.
            "think": False,
            "logprobs": True,
            "top_logprobs": options.top_logprobs,
            "options": {"num_predict": options.max_tokens, "temperature": 0, "repeat_penalty": 1.0},
        }
        return add_model(body, options)

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read a reply. The end token and a lost part of a character have no logprobs.

        Servers that parse a raw answer for thinking put that part into another field.
        """
        thinking = as_text(reply.get("thinking") or "", what="thinking")
        text = thinking + as_text(reply.get("response"), what="response")
        logprobs = as_array(reply.get("logprobs") or [], what="logprobs")
        positions = [parse_chat_position(item) for item in logprobs]
        if not positions:
            if text:
                raise LargeProtocolError("the reply has text and no logprobs")
            positions = [ReplyPosition(ReplyToken(text=""))]
        if reply.get("done_reason") == "stop":
            if text:
                positions.append(ReplyPosition(ReplyToken(text="")))
            positions = list(mark_end(positions))
        return Completion(
            tuple(positions),
            text,
            **checked_counts(reply.get("prompt_eval_count"), None, reply.get("eval_count")),
        )
