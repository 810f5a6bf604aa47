"""Asking a scripted server once, and replies to script it with."""

from __future__ import annotations

from typing import Any

from mlxroute.large import LargeModel
from mlxroute.types import LargeToken
from tests.loopback import REFUSES_NUMBER, Loopback, Reply
from tests.vocabularies import TableVocabulary, context

VOCABULARY = TableVocabulary(["a", "b", "Ġthe", "Ġ", "t", "h", "e", "zz", "Ã", "©"])
THE = VOCABULARY.id_of("Ġthe")


def legacy(text: str, /, **changes: Any) -> dict[str, Any]:
    """A reply in the shape of vLLM and of OpenAI's legacy models."""
    logprobs = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5, "a": -2}]}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs} | changes
    return {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


def contents(token: dict[str, Any] | None, /, **changes: Any) -> dict[str, Any]:
    """A reply in the shape of llama-server."""
    text = "" if token is None else token["token"]
    logprobs = None if token is None else {"content": [token]}
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs} | changes
    return {"choices": [choice]}


def ask_plain(
    server: Loopback, reply: Reply | dict[str, Any], *, text: str = "x", **options: Any
) -> LargeToken:
    """Settle on a plain server, then ask it once."""
    server.script.append(Reply.of(legacy("4")))
    server.script.append(reply if isinstance(reply, Reply) else Reply.of(reply))
    with LargeModel(server.url, model="m", **options) as large:
        return large.next_token(context(text, VOCABULARY))


def ask_mlx(
    server: Loopback, *replies: Reply, text: str = "x", vocabulary: TableVocabulary = VOCABULARY
) -> LargeToken:
    """Settle on an mlx_lm server, then ask it once."""
    server.script.extend([REFUSES_NUMBER, Reply.of({"data": []}), *replies])
    with LargeModel(server.url) as large:
        return large.next_token(context(text, vocabulary))
