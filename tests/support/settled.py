"""Clients that need no probe, and a server that a probe finds honest, for tests of single calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mlxroute.large import LargeModel
from mlxroute.large.dialects import Dialect
from mlxroute.large.dialects.completions import PlainCompletions
from mlxroute.large.negotiation import probe_questions
from mlxroute.large.negotiation.negotiator import NegotiatedDialect
from mlxroute.types import LargeToken
from tests.support.asking import VOCABULARY, legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.vocabularies import TableVocabulary, context

PLAIN: Final = PlainCompletions(logprobs=True)
_COUNTING_ON: Final = (" 12", ",", " 13", ",", " 14", ",", " 15")
_WRITTEN: Final = {
    question.text: (question.expected,)
    for question in (
        *probe_questions.MID_WORD,
        *probe_questions.TRAILING_SPACE,
        *probe_questions.MULTI_BYTE,
    )
} | {
    probe_questions.COUNTING.text + "".join(_COUNTING_ON[:count]): _COUNTING_ON[count:]
    for count in range(len(_COUNTING_ON))
}


def settled(large: LargeModel, dialect: Dialect = PLAIN) -> LargeModel:
    """The client with its terms set, so that the next request is that of its first call."""
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
    """One call, one request, and this reply to it."""
    server.script.append(reply if isinstance(reply, Reply) else Reply.of(reply))
    with settled(LargeModel(server.url, **({"model": "m"} | options)), dialect) as large:
        return large.next_token(context(text, vocabulary))


def honest(play: Callable[[Request], Reply], *, name: str = "m") -> Callable[[Request], Reply]:
    """The `answer` of a plain server with one model: the truth to a probe, otherwise `play`."""

    def answer(request: Request) -> Reply:
        return settling(request, name=name) or play(request)

    return answer


def settling(request: Request, *, name: str = "m") -> Reply | None:
    """What an honest plain server says to a request of the settlement; None to any other."""
    if request.path.endswith("/models"):
        return Reply.of({"data": [{"id": name}]})
    if not request.path.endswith("/v1/completions"):
        return Reply.of({"error": "no such route"}, status=404)
    if type(request.json.get("logprobs")) is not int:
        return Reply.of({"error": "logprobs must be a number"}, status=400)
    tokens = _WRITTEN.get(request.json["prompt"])
    return None if tokens is None else _completion(tokens[: request.json["max_tokens"]])


def _completion(tokens: tuple[str, ...]) -> Reply:
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-0.1] * len(tokens),
        "top_logprobs": [{token: -0.1, "~": -4.0} for token in tokens],
    }
    return Reply.of(legacy("".join(tokens), logprobs=logprobs))
