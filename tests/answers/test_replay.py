"""Replays: the recorded answer again, in every mode, without a call."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.answers.document import AnswerDocument
from mlxroute.answers.document_file import format_document, parse_document
from mlxroute.answers.recorded_answer import RecordedAnswer
from mlxroute.answers.replayed_large import ReplayedLarge, missing_positions
from mlxroute.engine.protocols import NamedLargeProtocol
from mlxroute.errors import LargeError, LargeRefused
from mlxroute.routers import EntropyRouter
from mlxroute.types import LargeToken, Mode
from tests.support.documents import QUESTION, make_document, record_answer
from tests.support.scripted_models import (
    EOS,
    FakeClock,
    ScriptedLarge,
    ScriptedReply,
    ScriptedSmall,
)
from tests.support.worlds import World, WorldLarge, WorldSmall

PROMPT_TOKENS = len("[user]hi?>")


def finish(answer: RecordedAnswer) -> AnswerDocument:
    for _ in answer:
        pass
    return parse_document(format_document(answer.document()))


def replay(
    document: AnswerDocument, script: bytes, unsure: Sequence[int], threshold: float
) -> AnswerDocument:
    small = ScriptedSmall(script, entropies=dict.fromkeys(unsure, 2.0))
    large = ReplayedLarge(document, prompt_tokens=PROMPT_TOKENS)
    return finish(record_answer(small, large, router=EntropyRouter(threshold)))


def test_a_replay_gives_the_recorded_answer_and_sends_nothing() -> None:
    document = make_document(b"abcd", [b"x", b"c"], unsure=(1, 2))
    again = replay(document, b"abcd", (1, 2), 1.0)
    assert again.summary.text == document.summary.text == "axcd"
    assert [token.decision for token in again.tokens] == [t.decision for t in document.tokens]
    assert (again.summary.requests, again.summary.uploaded_bytes) == (0, 0)
    assert again.models.large == "scripted"


def test_a_replay_of_an_answer_without_a_large_model_names_none() -> None:
    document = make_document(b"abcd", unsure=())
    alone = replace(document, models=replace(document.models, large=None, large_url=None))
    assert replay(alone, b"abcd", (), 1.0).models.large is None


def test_a_position_whose_reply_was_not_recorded_is_named() -> None:
    document = make_document(b"abcd", [b"x"], unsure=(1,))
    again = replay(document, b"abcd", (1,), -math.inf)
    assert missing_positions(again.tokens) == [0, 2, 3, 4]
    assert again.summary.text == "axcd"


def test_a_failed_call_has_no_reply() -> None:
    document = make_document(b"abcd", [LargeRefused("no"), b"x"], unsure=(1, 2))
    assert [reply.after for reply in document.replies] == [2]
    assert missing_positions(replay(document, b"abcd", (1, 2), 1.0).tokens) == [1]


def test_prefetched_tokens_are_replayed() -> None:
    small = ScriptedSmall(b"abcd", entropies={0: 2.0, 1: 2.0})
    document = finish(record_answer(small, ScriptedLarge([b"a", b"b"]), prefetch=0))
    again = ReplayedLarge(document, prompt_tokens=PROMPT_TOKENS)
    answer = record_answer(
        ScriptedSmall(b"abcd", entropies={0: 2.0, 1: 2.0}), again, mode=Mode.WAIT, prefetch=4
    )
    assert [token.prefetched for token in finish(answer).tokens[:2]] == [False, True]


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP, Mode.HEDGE])
def test_a_withheld_position_does_not_get_a_prefetched_token(mode: Mode, prefetch: int) -> None:
    world, clock = World(seed=5, loss=0.0), FakeClock()

    def record(large: NamedLargeProtocol, *patterns: str) -> RecordedAnswer:
        return record_answer(
            WorldSmall(world, clock),
            large,
            router=EntropyRouter(-math.inf),
            mode=mode,
            prefetch=prefetch,
            never_send=[re.compile(pattern) for pattern in patterns],
            clock=clock,
        )

    prompt = "[user]hi?>"
    text = finish(record(WorldLarge(world, clock, prompt=prompt, order=5))).summary.text
    pattern = re.escape(prompt + text[:2])
    recorded = finish(record(WorldLarge(world, clock, prompt=prompt, order=5), pattern))
    assert recorded.summary.withheld
    again = finish(record(ReplayedLarge(recorded, prompt_tokens=PROMPT_TOKENS)))
    assert [token.id for token in again.tokens] == [token.id for token in recorded.tokens]


def test_a_replay_has_the_token_of_the_answer_where_two_replies_disagree() -> None:
    document = make_document(b"abcd", [b"a", b"X"], unsure=(0, 2))
    first, second = document.replies
    # The first call went on to return other tokens than the second one, as a stream may.
    longer = [replace(first.tokens[0], ids=(ord(char),), text=char) for char in "abY"]
    document = replace(document, replies=(replace(first, tokens=tuple(longer)), second))
    assert replay(document, b"abcd", (0, 2), 1.0).summary.text == document.summary.text == "abXd"


@pytest.mark.parametrize("ends", [False, True])
def test_a_replay_ends_where_the_answer_ended_whatever_another_reply_says(ends: bool) -> None:
    replies: list[ScriptedReply] = [b"a", (EOS,) if ends else b"X"]
    document = make_document(b"abcd", replies, unsure=(0, 2))
    first, second = document.replies
    other = replace(second.tokens[0], ids=(ord("Y"),) if ends else (EOS,), ends=not ends)
    document = replace(document, replies=(replace(second, tokens=(other,)), first, second))
    again = replay(document, b"abcd", (0, 2), 1.0)
    assert [token.id for token in again.tokens] == [token.id for token in document.tokens]


class FickleLarge(WorldLarge):
    """A large model that decides otherwise in every second call, as a server may near a tie."""

    def _tokens(self, ids: tuple[int, ...], prefetch: int) -> tuple[LargeToken, ...] | LargeError:
        steady = self._world
        self._world = replace(steady, seed=steady.seed + len(self.calls) % 2)
        tokens = super()._tokens(ids, prefetch)
        self._world = steady
        return tokens


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(Mode)),
    st.sampled_from(list(Mode)),
    st.sampled_from([WorldLarge, FickleLarge]),
)
def test_every_mode_replays_what_any_mode_recorded(
    seed: int, first: Mode, second: Mode, kind: type[WorldLarge]
) -> None:
    world, clock = World(seed=seed, loss=0.0, streams=kind is FickleLarge), FakeClock()
    recorded = finish(
        record_answer(
            WorldSmall(world, clock),
            kind(world, clock, prompt="[user]hi?>", order=seed),
            mode=first,
            prefetch=2,
            clock=clock,
        )
    )
    large = ReplayedLarge(recorded, prompt_tokens=PROMPT_TOKENS)
    again = finish(
        record_answer(WorldSmall(world, clock), large, mode=second, prefetch=0, clock=clock)
    )
    assert [token.id for token in again.tokens] == [token.id for token in recorded.tokens]
    assert missing_positions(again.tokens) == []


@pytest.mark.parametrize("count", [1, 3])
def test_the_prompt_is_the_messages(count: int) -> None:
    document = make_document(messages=QUESTION * count)
    assert len(document.messages) == count
    assert document.question == "hi?"
