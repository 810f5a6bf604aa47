"""Clients whose dialect is set without a negotiation, and a server that passes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mlxroute.large import LargeModel
from mlxroute.large.dialects import Dialect
from mlxroute.large.dialects.completions import PlainCompletions
from mlxroute.large.negotiation import probe_questions
from mlxroute.large.negotiation.negotiator import NegotiatedDialect
from mlxroute.types import LargeToken
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.vocabularies import TableVocabulary, context

PLAIN: Final = PlainCompletions(logprobs=True)
_COUNTED: Final = (" 12", ",", " 13", ",", " 14", ",", " 15")
_CONTINUATIONS: Final = {
    question.text: (question.expected,)
    for question in (
        *probe_questions.MID_WORD,
        *probe_questions.TRAILING_SPACE,
        *probe_questions.MULTI_BYTE,
    )
} | {
    probe_questions.COUNTING.text + "".join(_COUNTED[:count]): _COUNTED[count:]
    for count in range(len(_COUNTED))
}


def negotiated(large: LargeModel, dialect: Dialect = PLAIN) -> LargeModel:
    """Set the client's dialect, so that its next request is that of its first call."""
    large._negotiator._negotiator.negotiated = NegotiatedDialect(dialect, None)
    return large


def ask_once(
    server: Loopback,
    reply: Reply | dict[str, Any],
    *,
    dialect: Dialect = PLAIN,
    text: str = "x",
    vocabulary: TableVocabulary = VOCABULARY,
    **options: Any,
) -> LargeToken:
    """Return the token of one call, whose one request gets this reply."""
    server.script.append(reply if isinstance(reply, Reply) else Reply.of(reply))
    with negotiated(LargeModel(server.url, **({"model": "m"} | options)), dialect) as large:
        return large.next_token(context(text, vocabulary))


def honest(script: Callable[[Request], Reply], *, name: str = "m") -> Callable[[Request], Reply]:
    """Return the `answer` of a plain server: correct in a negotiation, otherwise `script`."""

    def answer(request: Request) -> Reply:
        return negotiation_reply(request, name=name) or script(request)

    return answer


def negotiation_reply(request: Request, *, name: str = "m") -> Reply | None:
    """Return a plain server's correct reply to a request of a negotiation; None to any other."""
    if request.path.endswith("/models"):
        return Reply.of({"data": [{"id": name}]})
    if not request.path.endswith("/v1/completions"):
        return Reply.of({"error": "no such route"}, status=404)
    if type(request.json.get("logprobs")) is not int:
        return Reply.of({"error": "logprobs must be a number"}, status=400)
    tokens = _CONTINUATIONS.get(request.json["prompt"])
    return None if tokens is None else _completion(tokens[: request.json["max_tokens"]])


def _completion(tokens: tuple[str, ...]) -> Reply:
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-0.1] * len(tokens),
        "top_logprobs": [{token: -0.1, "~": -4.0} for token in tokens],
    }
    return Reply.of(legacy("".join(tokens), logprobs=logprobs))
