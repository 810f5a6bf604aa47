"""Servers that cut a prompt without a word, noticed by their own count of its tokens."""

from __future__ import annotations

import pytest

from mlxroute.errors import LargeProtocolError
from mlxroute.large import LargeModel
from mlxroute.large.dialects.ollama import OllamaGenerate
from mlxroute.large.vocabulary.truncation_guard import TruncationGuard
from tests.support.connected_clients import VOCABULARY
from tests.support.loopback import Loopback, Reply
from tests.support.negotiated import negotiated
from tests.support.vocabularies import context

_WORDS = " one two three four five six seven eight nine"


def refuses(*prompts: tuple[str, int | None]) -> bool:
    guard = TruncationGuard()
    try:
        for text, count in prompts:
            guard.check(text, count)
    except LargeProtocolError:
        return True
    return False


def test_a_count_that_stays_while_the_prompt_grows_is_a_cut_prompt() -> None:
    assert refuses(("a", 4096), ("a" + _WORDS, 4096))
    # In small steps, as an answer grows.
    assert refuses(*(("a" + _WORDS[:length], 4096) for length in range(len(_WORDS))))
    assert refuses(("a", 4096), ("a" + "字" * 400, 4096))


def test_other_counts_are_no_cut_prompt() -> None:
    assert not refuses(("a", 4096), ("a" + _WORDS, 4105))
    assert not refuses(("a", 4096), ("a", 4096), ("a b", 4096))
    assert not refuses(("a", 4096), ("b" + _WORDS, 4096))
    assert not refuses(("a", None), ("a" + _WORDS, None))
    assert not refuses(("a", 1), ("a" + _WORDS, 1))
    assert not refuses(("a" + _WORDS, 4096), ("a", 4096))


def test_an_ollama_that_ignores_the_request_not_to_truncate_is_refused() -> None:
    token = {"token": "a", "logprob": -0.5}
    reply = {
        "response": "a",
        "done_reason": "length",
        "logprobs": [token | {"top_logprobs": [token]}],
        "prompt_eval_count": 4096,
    }
    with (
        Loopback(lambda request: Reply.of(reply)) as server,
        negotiated(LargeModel(server.url, model="m"), OllamaGenerate()) as large,
    ):
        assert large.next_token(context("the prompt", VOCABULARY)).text == "a"
        assert server.requests[-1].json["truncate"] is False
        assert server.requests[-1].json["think"] is False
        with pytest.raises(LargeProtocolError, match="cut the prompt to 4,096 tokens"):
            large.next_token(context("the prompt" + _WORDS, VOCABULARY))
