"""Servers that cut a prompt without a word, noticed by their own count of its tokens."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlxroute.errors import LargeProtocolError
from mlxroute.large import LargeModel
from mlxroute.large.dialects.chat.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.ollama import OllamaGenerate
from mlxroute.large.vocabulary.truncation_guard import TruncationGuard
from mlxroute.types import Span
from tests.support.connected_clients import VOCABULARY, content_reply
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


def test_conversations_in_turn_are_each_compared_with_their_own_prompts() -> None:
    long, other = "a" + _WORDS, "b" + _WORDS
    assert refuses(("a", 4096), ("b", 4096), (long, 4096))
    assert not refuses(("a", 4000), ("b", 4000), (long, 4009), (other, 4009))
    # A prompt that grows with its count is forgotten, and so are those of long ago.
    assert not refuses(("a", 4096), (long, 4105), (long + "!", 4096))
    others = [(f"{number} ", 4096) for number in range(16)]
    assert not refuses(("a", 4096), *others, (long, 4096))


def test_prompts_of_several_threads_are_compared() -> None:
    guard = TruncationGuard()

    def check(name: int) -> None:
        for count in range(4000, 5000):
            guard.check(f"{name} " + "word " * (count - 4000), count)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(check, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_a_cut_prompt_is_refused_each_time() -> None:
    guard = TruncationGuard()
    guard.check("a", 4096)
    for _ in range(2):
        with pytest.raises(LargeProtocolError):
            guard.check("a" + _WORDS, 4096)


def test_other_counts_are_no_cut_prompt() -> None:
    assert not refuses(("a", 4096), ("a" + _WORDS, 4105))
    assert not refuses(("a", 4096), ("a", 4096), ("a b", 4096))
    assert not refuses(("a", 4096), ("b" + _WORDS, 4096))
    assert not refuses(("a", None), ("a" + _WORDS, None))
    assert not refuses(("a", 1), ("a" + _WORDS, 1))
    assert not refuses(("a" + _WORDS, 4096), ("a", 4096))


@pytest.mark.parametrize("is_later", [False, True])
def test_a_chat_that_is_cut_without_a_word_is_refused(is_later: bool) -> None:
    """The answer so far has grown, or a later question is asked after it."""
    reply = content_reply({"token": "a", "logprob": -0.5})
    reply["choices"][0] |= {"message": {"role": "assistant", "content": "a"}}
    reply["usage"] = {"prompt_tokens": 4096, "completion_tokens": 1}
    asked = ({"role": "user", "content": "the prompt"},)
    answered = {"role": "assistant", "content": "the answer"}
    again = (*asked, answered, {"role": "user", "content": "and" + _WORDS})
    first = context("", VOCABULARY, messages=asked, spans=(Span("the answer"),))
    later = context("", VOCABULARY, messages=asked, spans=(Span("the answer" + _WORDS),))
    if is_later:
        later = context("", VOCABULARY, messages=again)
    with (
        Loopback(lambda request: Reply.of(reply)) as server,
        negotiated(
            LargeModel(server.url, model="m"), ChatContinuation(ContinuationMethod.TRAILING)
        ) as large,
    ):
        assert large.next_token(first).text == "a"
        with pytest.raises(LargeProtocolError, match="cut the prompt to 4,096 tokens"):
            large.next_token(later)


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
