"""Reference answers: what mlx_lm and the servers write themselves."""

from __future__ import annotations

import math
from typing import Any

import requests

from mlxroute.small import SmallModel
from mlxroute.types import Message, Token
from tests.real.servers import Kind, RunningServer

# Logits below this are rounded to multiples of half of it times the dtype's relative step.
_LARGEST_LOGIT = 32


def near_tie_nats(small: SmallModel, *, at_least: float = 0.01) -> float:
    """Return the gap between logprobs below which MLX may choose otherwise in a batch.

    That is two rounding steps of the logits: 0.25 nats in bfloat16, and 0.03 in float16. In
    float32, `at_least` is more than that.
    """
    import mlx.core as mx

    step = _LARGEST_LOGIT / 2 * mx.finfo(small.model(mx.array([[0]])).dtype).eps
    return max(at_least, 2 * step)


def mlx_lm_greedy(small: SmallModel, prompt: str, count: int) -> list[int]:
    """Return the ids mlx_lm decodes greedily after a user message, the end token included."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    prompt_ids = list(small.encode_conversation([{"role": "user", "content": prompt}]).ids)
    ids = []
    for token, _ in generate_step(mx.array(prompt_ids), small.model, max_tokens=count):
        ids.append(int(token))
        if ids[-1] in small.vocabulary.eos_ids:
            break
    return ids


def mlx_lm_server_greedy(url: str, prompt_text: str, count: int) -> list[dict[str, Any]]:
    """Return mlx_lm.server's greedy answer as {"id", "gap"}; gap is top-1 minus top-2 logprob."""
    body = {
        "prompt": prompt_text,
        "max_tokens": count,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = requests.post(f"{url}/completions", json=body, timeout=300)
    reply.raise_for_status()
    entries = []
    for entry in reply.json()["choices"][0]["logprobs"]["content"]:
        best, second = sorted(entry["top_logprobs"], key=lambda top: -top["logprob"])
        entries.append({"id": best["id"], "gap": best["logprob"] - second["logprob"]})
    return entries


def greedy_answer(server: RunningServer, prompt_text: str, count: int) -> list[dict[str, Any]]:
    """Return a server's greedy answer as {"id", "gap"}; the gap is inf where it is unknown."""
    match server.kind:
        case Kind.LLAMA_SERVER:
            return _llama_answer(server, prompt_text, count)
        case Kind.VLLM:
            return _vllm_answer(server, prompt_text, count)
        case Kind.MLX_LM:
            return mlx_lm_server_greedy(server.url, prompt_text, count)


def _llama_answer(server: RunningServer, prompt_text: str, count: int) -> list[dict[str, Any]]:
    body = {"prompt": prompt_text, "n_predict": count, "temperature": 0, "n_probs": 2}
    reply = _post(f"{server.root}/completion", body | {"return_tokens": True})
    probabilities, entries = list(reply.get("completion_probabilities", [])), []
    for token_id in reply["tokens"]:
        # A token that leaves its character unfinished has no entry.
        logprobs = []
        if probabilities and probabilities[0]["id"] == token_id:
            logprobs = [top["logprob"] for top in probabilities.pop(0)["top_logprobs"]]
        entries.append({"id": token_id, "gap": _gap(logprobs)})
    return entries


def _vllm_answer(server: RunningServer, prompt_text: str, count: int) -> list[dict[str, Any]]:
    body = {
        "model": server.model_id,
        "prompt": prompt_text,
        "max_tokens": count,
        "temperature": 0,
        "logprobs": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    choice = _post(f"{server.url}/completions", body)["choices"][0]
    tops = choice["logprobs"]["top_logprobs"]
    return [
        {"id": token_id, "gap": _gap(sorted(top.values(), reverse=True))}
        for token_id, top in zip(choice["token_ids"], tops, strict=True)
    ]


def chat_answer(server: RunningServer, messages: list[Message], count: int) -> tuple[str, bool]:
    """Return the text a server's chat route writes greedily, and whether it ended by itself."""
    body = {
        "model": server.model_id,
        "messages": messages,
        "max_tokens": count,
        "temperature": 0,
    }
    choice = _post(f"{server.url}/chat/completions", body)["choices"][0]
    return choice["message"].get("content") or "", choice["finish_reason"] == "stop"


def _post(url: str, body: dict[str, Any]) -> Any:
    reply = requests.post(url, json=body, timeout=300)
    reply.raise_for_status()
    return reply.json()


def _gap(logprobs: list[float]) -> float:
    return logprobs[0] - logprobs[1] if len(logprobs) > 1 else math.inf


def first_difference(
    tokens: list[Token], expected: list[dict[str, Any]]
) -> tuple[int, float] | None:
    """Return the first index at which the answers differ, and the smaller top-2 gap there."""
    for index, (token, entry) in enumerate(zip(tokens, expected, strict=False)):
        if token.token_id != entry["id"]:
            return index, min(entry["gap"], top_gap(token))
    return None


def top_gap(token: Token) -> float:
    """Return the gap between the large model's two best choices, in nats; inf if unknown."""
    if token.escalation is None or token.escalation.large is None:
        return math.inf
    return _gap([logprob for _, logprob in token.escalation.large.top])
