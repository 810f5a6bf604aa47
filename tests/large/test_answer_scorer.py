"""Logprobs of answers that the large model did not write itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused
from mlxroute.large import LargeModel
from mlxroute.types import LargeContext, Span
from tests.support.family_servers import VOCABULARY, FamilyServer, score_of
from tests.support.loopback import Loopback, Reply, Request
from tests.support.vocabularies import context

_PROMPT = context("1, 2, 3,", VOCABULARY, answer=VOCABULARY.encode("1, 2, 3,"))


def answered(text: str) -> LargeContext:
    """The prompt with an answer."""
    return replace(
        _PROMPT,
        text=_PROMPT.text + text,
        token_ids=(*_PROMPT.token_ids, *VOCABULARY.encode(text)),
        spans=(Span(text),),
    )


def score(
    answer: Callable[[Request], Reply], text: str = " 7 pineapples"
) -> tuple[list[float], list[Request], LargeModel]:
    """The scores of an answer, the requests for them, and the client."""
    with Loopback(answer) as server, LargeModel(server.url, model="m") as large:
        large.connect()
        large.pair_vocabulary(VOCABULARY)
        count = len(server.requests)
        logprobs = list(large.scorer(timeout_s=5).score(_PROMPT, answered(text)))
        return logprobs, server.requests[count:], large


def test_the_bytes_of_a_character_can_be_scored_by_openais_names() -> None:
    def named(path: str, body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        logprobs = reply["choices"][0].get("logprobs")
        if logprobs and body.get("echo"):
            names = [VOCABULARY.token_bytes(i) for i in VOCABULARY.encode(body["prompt"])]
            logprobs["tokens"][: len(names)] = map(_openai_name, names)
        return reply

    logprobs, *_ = score(FamilyServer("legacy", change_reply=named), " naïve")
    assert logprobs == [score_of(token_id) for token_id in VOCABULARY.encode(" naïve")]


def _openai_name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@pytest.mark.parametrize(
    ("family", "path", "text", "has_one_request"),
    [
        ("llama-server", "/completion", " 7 pineapples", False),
        ("vllm", "/v1/completions", " 7 pineapples, naïve", True),
        ("legacy", "/v1/completions", " 7 pineapples", True),
    ],
)
def test_every_token_of_an_answer_is_scored(
    family: str, path: str, text: str, has_one_request: bool
) -> None:
    ids = VOCABULARY.encode(text)
    logprobs, requests, large = score(FamilyServer(family), text)
    assert logprobs == [score_of(token_id) for token_id in ids]
    assert {request.path for request in requests} == {path}
    assert len(requests) == (1 if has_one_request else len(ids))
    assert large.uploads.tokens > 0


def test_the_bytes_of_a_character_cannot_be_scored_by_their_text() -> None:
    with pytest.raises(LargeProtocolError, match="did not echo the text"):
        score(FamilyServer("legacy"), " naïve")
    with pytest.raises(LargeProtocolError, match="ends inside a character"):
        score(FamilyServer("llama-server"), " naïve")


@pytest.mark.parametrize("family", ["mlx_lm", "sglang", "tgi", "ollama", "text only"])
def test_servers_without_a_way_are_named_and_not_asked(family: str) -> None:
    with Loopback(FamilyServer(family)) as server, LargeModel(server.url, model="m") as large:
        line = large.connect()
        large.pair_vocabulary(VOCABULARY)
        count = len(server.requests)
        with pytest.raises(LargeProtocolError, match="gives no logprobs of a text") as caught:
            list(large.scorer(timeout_s=5).score(_PROMPT, answered(" 7")))
        assert line.partition("(")[2].rstrip(")") in str(caught.value)
        assert len(server.requests) == count


def _refusing(status: int) -> Callable[[Request], Reply]:
    """A server that refuses to echo."""
    honest = FamilyServer("vllm")

    def answer(request: Request) -> Reply:
        if request.path == "/v1/completions" and request.json.get("echo"):
            return Reply.of({"error": {"message": "no echo here"}}, status=status)
        return honest(request)

    return answer


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, LargeProtocolError), (422, LargeProtocolError), (401, LargeRefused)],
)
def test_only_a_refusal_of_the_request_says_that_there_is_no_way(
    status: int, error: type[LargeError]
) -> None:
    with pytest.raises(error, match="no echo here"):
        score(_refusing(status))


def test_refusals_do_not_pause_calls() -> None:
    with Loopback(_refusing(400)) as server, LargeModel(server.url, model="m") as large:
        large.connect()
        for _ in range(4):
            with pytest.raises(LargeProtocolError, match="no echo here"):
                list(large.scorer(timeout_s=5).score(_PROMPT, answered(" 7")))
        assert large.next_token(_PROMPT).text == " "


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("vllm", lambda logprobs: logprobs["tokens"].pop(0), "differ in number"),
        ("vllm", lambda logprobs: logprobs.clear(), "is not a JSON array"),
        ("vllm", lambda logprobs: logprobs["tokens"].reverse(), "did not echo"),
        ("vllm", lambda logprobs: logprobs.update(token_logprobs=[None] * 99), "differ in number"),
        ("legacy", lambda logprobs: logprobs["tokens"].__setitem__(0, "?"), "did not echo"),
        ("legacy", lambda logprobs: _merge(logprobs), "reaches beyond the text"),
    ],
)
def test_a_reply_about_other_tokens_is_refused(
    family: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    def edited(path: str, body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if body.get("echo"):
            change(reply["choices"][0]["logprobs"])
        return reply

    with pytest.raises(LargeProtocolError, match=message):
        score(FamilyServer(family, change_reply=edited))


def _merge(logprobs: dict[str, Any]) -> None:
    """Make the last token of the prompt and the first of the answer one token."""
    at = len(VOCABULARY.encode(_PROMPT.text))
    tokens = logprobs["tokens"]
    tokens[at - 1 : at + 1] = [tokens[at - 1] + tokens[at]]
    logprobs["token_logprobs"].pop()


def test_a_token_before_the_prompt_does_not_shift_the_answer() -> None:
    def begun(path: str, body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if body.get("echo"):
            logprobs = reply["choices"][0]["logprobs"]
            logprobs["tokens"].insert(0, "<s>")
            logprobs["token_logprobs"][:1] = [None, -3.0]
        return reply

    ids = VOCABULARY.encode(" 7 pineapples")
    logprobs, *_ = score(FamilyServer("legacy", change_reply=begun))
    assert logprobs == [score_of(token_id) for token_id in ids]


def _other_token(reply: dict[str, Any]) -> None:
    reply["tokens"] = [VOCABULARY.encode("Q")[0]]
    reply["completion_probabilities"][0]["id"] = reply["tokens"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_token, "did not take the token"),
        (lambda reply: reply.pop("completion_probabilities"), "ends inside a character"),
        (
            lambda reply: reply["completion_probabilities"][0].update(
                logprob=-3.4028234663852886e38
            ),
            "rounds to 0",
        ),
    ],
)
def test_a_forced_token_without_its_logprob_is_refused(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    def edited(path: str, body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if "logit_bias" in body:
            change(reply)
        return reply

    with pytest.raises(LargeProtocolError, match=message):
        score(FamilyServer("llama-server", change_reply=edited))
