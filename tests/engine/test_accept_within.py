"""`accept_within`: the small model's token stays where the large one finds it nearly as likely."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxroute.engine import Answer, Options
from mlxroute.routers import EntropyRouter
from mlxroute.types import LargeToken, Mode, Source, Token
from tests.support.scripted_models import FakeClock, ScriptedLarge, ScriptedSmall
from tests.support.worlds import token_of


class OneReply(ScriptedLarge):
    """A large model that always returns one token."""

    def __init__(self, token: LargeToken) -> None:
        super().__init__([b"X"])
        self._token = token

    def _tokens(self, reply: object) -> LargeToken:
        return self._token


LARGE = replace(token_of((ord("X"),)), logprob=-0.5, top_bytes=((b"X", -0.5), (b"b", -0.7)))


def answered(large: LargeToken, accept_within: float) -> tuple[list[Token], Answer]:
    answer = Answer(
        ScriptedSmall(b"abc", entropies={1: 2.0}),
        OneReply(large),
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(1.0),
        options=Options(mode=Mode.WAIT, accept_within=accept_within),
        clock=FakeClock(),
    )
    return list(answer), answer


@pytest.mark.parametrize(("within", "text"), [(0.0, "aXc"), (0.19, "aXc"), (0.21, "abc")])
def test_the_small_token_stays_within_the_given_nats(within: float, text: str) -> None:
    tokens, _ = answered(LARGE, within)
    assert "".join(token.text for token in tokens) == text


def test_an_accepted_token_is_the_small_models_checked_and_counted() -> None:
    tokens, answer = answered(LARGE, 0.3)
    token, stats = tokens[1], answer.stats()
    assert token.source is Source.SMALL
    assert token.checked
    assert token.escalation is not None
    assert token.escalation.accepted
    assert token.escalation.large == LARGE
    assert (stats.escalated, stats.accepted, stats.agreed, stats.large_tokens) == (1, 1, 0, 0)


def test_an_agreed_token_is_the_large_models_as_before() -> None:
    agreed = replace(LARGE, token_ids=(ord("b"),), text="b")
    tokens, answer = answered(agreed, 0.3)
    assert tokens[1].source is Source.LARGE
    assert (answer.stats().agreed, answer.stats().accepted) == (1, 0)


@pytest.mark.parametrize(
    "token",
    [
        replace(LARGE, top_bytes=((b"X", -0.5),)),
        replace(LARGE, top_bytes=()),
        replace(LARGE, logprob=None),
    ],
)
def test_without_the_small_tokens_logprob_the_large_token_is_taken(token: LargeToken) -> None:
    tokens, _ = answered(token, 5.0)
    assert tokens[1].text == "X"


def test_the_small_models_end_is_not_accepted() -> None:
    small = ScriptedSmall(b"a", entropies={1: 2.0})
    answer = Answer(
        small,
        OneReply(replace(LARGE, top_bytes=((b"", -0.5),))),
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(1.0),
        options=Options(mode=Mode.WAIT, accept_within=1.0, max_tokens=2),
        clock=FakeClock(),
    )
    assert "".join(token.text for token in answer) == "aX"
