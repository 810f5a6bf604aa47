"""What mlx_lm and the servers would have written themselves."""

from __future__ import annotations

from typing import Any

import requests

from mlxroute.small import SmallModel
from mlxroute.types import Token

NEAR_TIE_NATS = 0.01


def mlx_lm_greedy(small: SmallModel, prompt: str, count: int) -> list[int]:
    """The ids mlx_lm decodes greedily after a user message, the end token included."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    prompt_ids = small.encode_prompt(small.render([{"role": "user", "content": prompt}]))
    ids = []
    for token, _ in generate_step(mx.array(prompt_ids), small.model, max_tokens=count):
        ids.append(int(token))
        if ids[-1] in small.vocabulary.eos_ids:
            break
    return ids


def server_greedy(url: str, prompt_text: str, count: int) -> list[dict[str, Any]]:
    """The server's own greedy answer, as {"id", "gap"}: gap is top-1 minus top-2 logprob."""
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


def first_difference(
    tokens: list[Token], expected: list[dict[str, Any]]
) -> tuple[int, float] | None:
    """Where the two answers part, and the smaller of the two top-2 gaps seen there."""
    for index, (token, entry) in enumerate(zip(tokens, expected, strict=False)):
        if token.token_id != entry["id"]:
            gaps = [entry["gap"]]
            if token.escalation and token.escalation.large:
                top = [logprob for _, logprob in token.escalation.large.top[:2]]
                gaps += [top[0] - top[1]] if len(top) == 2 else []
            return index, min(gaps)
    return None
