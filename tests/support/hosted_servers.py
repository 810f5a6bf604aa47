"""Chat routes of hosted providers: what each refuses, in its own words, and what it counts.

The texts and shapes of the replies are those that the providers document, or that users quote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.support.loopback import Reply, Request

Json = dict[str, Any]
Refuse = Callable[[Json], Reply | None]
# The next tokens of the answer to these messages, and whether the answer ends.
Write = Callable[[Sequence[Json], int], tuple[list[bytes], bool]]

_MESSAGES: Final = {"model", "messages"}
_SAMPLING: Final = {"max_tokens", "temperature", "logprobs", "top_logprobs"}
CACHED_TOKENS: Final = 1408


def count_prompt_tokens(messages: Sequence[Json]) -> int:
    """Return how many tokens the providers count for these messages."""
    return 1500 + sum(len(str(message["content"]).split()) for message in messages)


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider with one kind of model.

    `refuse` returns the refusal of a request or None. `thoughts` returns the tokens of thought that
    come before the answer. `thoughts_in_total` leaves them out of `completion_tokens`;
    `counts_thoughts` names them in the details. `reports_cache` counts cached prompt tokens.
    """

    refuse: Refuse
    thoughts: Callable[[Json], int] = lambda body: 0
    logprobs: bool = False
    thoughts_in_total: bool = False
    counts_thoughts: bool = True
    reports_cache: bool = True
    refuses_lost_budget: bool = False

    def reply(self, body: Json, write: Write) -> Reply:
        """Return the reply to a request, whose answer `write` writes."""
        if (refusal := self.refuse(body)) is not None:
            return refusal
        budget = body.get("max_tokens") or body["max_completion_tokens"]
        thoughts = min(self.thoughts(body), budget)
        tokens, ends = write(body["messages"], budget - thoughts) if budget > thoughts else ([], 0)
        if self.refuses_lost_budget and not tokens and not ends:
            return _openai(
                "Could not finish the message because max_tokens or model output limit was reached."
                " Please try again with higher max_tokens.",
                param=None,
                code=None,
            )
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": b"".join(tokens).decode(errors="replace")},
            "finish_reason": "stop" if ends else "length",
            "logprobs": None,
        }
        if body.get("logprobs") and self.logprobs:
            choice["logprobs"] = {"content": [_logprobs(token) for token in tokens]}
        return Reply.of(
            {"choices": [choice], "usage": self._usage(body, thoughts, len(tokens) + ends)}
        )

    def _usage(self, body: Json, thoughts: int, answer: int) -> Json:
        prompt = count_prompt_tokens(body["messages"])
        completion = answer + (0 if self.thoughts_in_total else thoughts)
        usage: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + thoughts + answer,
        }
        if self.reports_cache:
            usage["prompt_tokens_details"] = {"cached_tokens": CACHED_TOKENS}
        if self.counts_thoughts:
            usage["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return usage


class HostedServer:
    """A provider's chat route and list of models, as the `answer` of a `Loopback`."""

    def __init__(self, provider: Provider, write: Write) -> None:
        self._provider = provider
        self._write = write

    def __call__(self, request: Request) -> Reply:
        if request.path.endswith("/models"):
            return Reply.of({"data": [{"id": "m"}]})
        if request.path.endswith("/chat/completions"):
            return self._provider.reply(request.json, self._write)
        return Reply.of({"error": {"message": "Not Found"}}, status=404)


def _logprobs(token: bytes) -> Json:
    entry = {"token": token.decode(errors="replace"), "bytes": list(token), "logprob": -0.1}
    return {**entry, "top_logprobs": [entry]}


def _openai(message: str, *, param: str | None, code: str | None, status: int = 400) -> Reply:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Reply.of({"error": error}, status=status)


# OpenAI


def _openai_model(
    *,
    efforts: str = "",
    greedy_effort: str | None = None,
    logprobs: str = "",
    forbidden: bool = False,
) -> Refuse:
    """Return the refusals of a model.

    `efforts` are its values of `reasoning_effort`. With `greedy_effort` a temperature is refused at
    every other effort. `logprobs` is the effort that logprobs need; `forbidden` refuses them at
    every effort.
    """

    def refuse(body: Json) -> Reply | None:
        effort = body.get("reasoning_effort", "")
        known = _MESSAGES | _SAMPLING | {"max_completion_tokens"}
        for name in body.keys() - known - ({"reasoning_effort"} if efforts else set()):
            return _openai(f"Unrecognized request argument supplied: {name}", param=None, code=None)
        if efforts and "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use"
            return _openai(
                f"{text} 'max_completion_tokens' instead.",
                param="max_tokens",
                code="unsupported_parameter",
            )
        if effort and effort not in efforts.split():
            return _openai(
                f"Unsupported value: 'reasoning_effort' does not support '{effort}' with this"
                f" model. Supported values are: {_listed(efforts)}.",
                param="reasoning_effort",
                code="unsupported_value",
            )
        if "temperature" in body and greedy_effort is not None and effort != greedy_effort:
            return _openai(
                "Unsupported value: 'temperature' does not support 0 with this model. Only the"
                " default (1) value is supported.",
                param="temperature",
                code="unsupported_value",
            )
        if "logprobs" in body and forbidden:
            text = "You are not allowed to request logprobs from this model"
            return _openai(text, param=None, code=None, status=403)
        if "logprobs" in body and logprobs and effort != logprobs:
            return _openai(
                "Unsupported parameter: 'logprobs' is not supported with this model.",
                param="logprobs",
                code="unsupported_parameter",
            )
        if efforts and body["max_completion_tokens"] < 4:
            return _openai(
                "Could not finish the message because max_tokens or model output limit was"
                " reached. Please try again with higher max_tokens.",
                param=None,
                code=None,
            )
        return None

    return refuse


def _listed(efforts: str) -> str:
    quoted = [f"'{effort}'" for effort in efforts.split()]
    return ", ".join(quoted[:-1]) + f", and {quoted[-1]}"


def _thinks(costs: dict[str, int], *, default: int) -> Callable[[Json], int]:
    return lambda body: costs.get(body.get("reasoning_effort", ""), default)


# Anthropic's route in OpenAI's format


def _anthropic(*, prefill: bool, temperature: bool) -> Refuse:
    def refuse(body: Json) -> Reply | None:
        if "temperature" in body and not temperature:
            return _openai("`temperature` is deprecated for this model.", param=None, code=None)
        if body["messages"][-1]["role"] == "assistant" and not prefill:
            return _openai(
                "This model does not support assistant message prefill. The conversation must end"
                " with a user message.",
                param=None,
                code=None,
            )
        return None

    return refuse


# Google's route in OpenAI's format


def _google(*, refused_efforts: str = "") -> Refuse:
    known = _MESSAGES | _SAMPLING | {"max_completion_tokens", "reasoning_effort"}

    def refuse(body: Json) -> Reply | None:
        if unknown := sorted(body.keys() - known):
            names = [f'Unknown name "{name}": Cannot find field.' for name in unknown]
            return _google_error("\n".join(f"Invalid JSON payload received. {n}" for n in names))
        if body.get("reasoning_effort") in refused_efforts.split():
            return _google_error("Thinking level MINIMAL is not supported for this model.")
        if "logprobs" in body:
            return _google_error("Logprobs is not enabled for this model")
        return None

    return refuse


def _google_error(message: str) -> Reply:
    error = {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}
    return Reply.of([{"error": error}], status=400)


# xAI


def _xai(*, efforts: str = "") -> Refuse:
    def refuse(body: Json) -> Reply | None:
        if body.get("reasoning_effort", efforts[:3]) not in efforts:
            text = "Model grok does not support parameter reasoningEffort."
            return Reply.of({"code": "invalid-argument", "error": text}, status=400)
        return None

    return refuse


# Mistral


def _mistral(body: Json) -> Reply | None:
    unknown = body.keys() - _MESSAGES - _SAMPLING - {"reasoning_effort"}
    places: list[list[object]] = [["body", name] for name in sorted(unknown)]
    places += [
        ["body", "messages", at, message["role"], name]
        for at, message in enumerate(body["messages"])
        for name in message.keys() - {"role", "content", "prefix"}
    ]
    if places:
        text = "Extra inputs are not permitted"
        detail = [{"type": "extra_forbidden", "loc": loc, "msg": text} for loc in places]
        error = {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error"}
        return Reply.of(error, status=422)
    if "logprobs" in body:
        text = "Logprobs are not enabled for this model"
        return Reply.of({"object": "error", "message": text, "code": "3051"}, status=400)
    return None


# Groq


def _groq(*, efforts: str = "") -> Refuse:
    known = _MESSAGES | _SAMPLING | {"max_completion_tokens", "reasoning_effort"}

    def refuse(body: Json) -> Reply | None:
        for name in body.keys() - known:
            return _openai(f"property '{name}' is unsupported", param=None, code=None)
        if "logprobs" in body:
            text = "`logprobs` is not supported with this model"
            return _openai(text, param="logprobs", code=None)
        effort = body.get("reasoning_effort")
        if effort and not efforts:
            text = "`reasoning_effort` is not supported with this model"
            return _openai(text, param=None, code=None)
        if effort and effort not in efforts.split():
            listed = ", ".join(f"`{value}`" for value in efforts.split())
            text = f"`reasoning_effort` must be one of {listed}"
            return _openai(text, param=None, code=None)
        return None

    return refuse


# DeepSeek and OpenRouter


def _deepseek(body: Json) -> Reply | None:
    if body.get("reasoning_effort") == "none":
        return _openai("Invalid value: none for reasoning_effort", param=None, code=None)
    if "logprobs" in body and "thinking" not in body:
        return _openai("This model does not support logprobs", param=None, code=None)
    return None


def _openrouter(body: Json) -> Reply | None:
    budget = body.get("max_tokens", 16)
    if budget >= 16:
        return None
    text = "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but"
    raw = {"error": {"message": f"{text} got {budget} instead.", "param": "max_output_tokens"}}
    metadata = {"raw": json.dumps(raw), "provider_name": "Azure"}
    error = {"message": "Provider returned error", "code": 400, "metadata": metadata}
    return Reply.of({"error": error}, status=400)


PROVIDERS: Final = {
    "OpenAI GPT-4.1": Provider(_openai_model(), logprobs=True),
    "OpenAI GPT-5 mini": Provider(
        _openai_model(efforts="minimal low medium high", greedy_effort="", forbidden=True),
        _thinks({"minimal": 0, "low": 90}, default=200),
        refuses_lost_budget=True,
    ),
    "OpenAI GPT-5.6": Provider(
        _openai_model(efforts="none low medium high", greedy_effort="none", logprobs="none"),
        _thinks({"none": 0, "low": 80}, default=200),
        logprobs=True,
        refuses_lost_budget=True,
    ),
    "OpenAI o3": Provider(
        _openai_model(efforts="low medium high", greedy_effort="", forbidden=True),
        _thinks({"low": 120}, default=400),
        refuses_lost_budget=True,
    ),
    "Anthropic Claude 4.5": Provider(
        _anthropic(prefill=True, temperature=True), counts_thoughts=False, reports_cache=False
    ),
    "Anthropic Claude 5": Provider(
        _anthropic(prefill=False, temperature=False), counts_thoughts=False, reports_cache=False
    ),
    "Google Flash": Provider(
        _google(),
        _thinks({"none": 0}, default=150),
        thoughts_in_total=True,
        counts_thoughts=False,
    ),
    "Google Pro": Provider(
        _google(refused_efforts="none minimal"),
        _thinks({"low": 30}, default=300),
        thoughts_in_total=True,
        counts_thoughts=False,
    ),
    "xAI without reasoning": Provider(_xai()),
    "xAI Grok 4": Provider(_xai(), _thinks({}, default=220), thoughts_in_total=True),
    "Mistral": Provider(_mistral),
    "Groq Llama": Provider(_groq()),
    "Groq Qwen": Provider(_groq(efforts="none default"), _thinks({"none": 0}, default=120)),
    "Groq GPT-OSS": Provider(_groq(efforts="low medium high"), _thinks({"low": 20}, default=90)),
    "DeepSeek": Provider(
        _deepseek,
        lambda body: 0 if body.get("thinking") == {"type": "disabled"} else 200,
        logprobs=True,
    ),
    "OpenRouter": Provider(_openrouter),
}
"""The providers whose replies are scripted, each with a kind of model."""
FIELDS: Final = {
    "OpenAI GPT-4.1": "",
    "OpenAI GPT-5 mini": "max_completion_tokens, no temperature, no logprobs, effort minimal,"
    " 16 tokens or more",
    "OpenAI GPT-5.6": "max_completion_tokens, effort none, 16 tokens or more",
    "OpenAI o3": None,
    "Anthropic Claude 4.5": "",
    "Anthropic Claude 5": "no temperature, effort none",
    "Google Flash": "no logprobs, effort none",
    "Google Pro": "no logprobs, effort low, 64 tokens or more",
    "xAI without reasoning": "",
    "xAI Grok 4": None,
    "Mistral": "no logprobs, effort none",
    "Groq Llama": "no logprobs",
    "Groq Qwen": "no logprobs, effort none",
    "Groq GPT-OSS": "no logprobs, effort low, 64 tokens or more",
    "DeepSeek": "thinking disabled",
    "OpenRouter": "16 tokens or more",
}
"""The fields that each takes, as `RequestFields` describes them; None if thoughts cost too much."""
