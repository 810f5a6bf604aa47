"""Failures of an answer: the first of each kind is reported, and all are counted by kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mlxroute.engine import Answer, Experience, Options, generate
from mlxroute.engine.escalation.failures import AllowanceUsed, failure_kind
from mlxroute.errors import (
    LargeError,
    LargeNotContinued,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
    LargeUnreachable,
    LargeUnrecorded,
    LargeUnsendable,
)
from mlxroute.routers import EntropyRouter
from mlxroute.types import CallFailure, Mode
from mlxroute.view import summary_line
from tests.support.scripted_models import FakeClock, ScriptedLarge, ScriptedSmall

KEY_GONE = LargeRefused("http://box/v1 answered 401: no; check the API key", status=401)
NO_MODEL = LargeRefused("http://box/v1 answered 404: no such model", status=404)
TOO_LONG = LargeRefused("http://box/v1 answered 413: too large", status=413)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LargeTimeout("x"), "timeout"),
        (LargeUnreachable("x"), "unreachable"),
        (LargeUnavailable("x"), "paused"),
        (AllowanceUsed(30), "no time left"),
        (LargeUnrecorded("x"), "not recorded"),
        (LargeProtocolError("x"), "invalid reply"),
        (LargeNotContinued("x"), "not continued"),
        (LargeUnsendable("x"), "cannot be sent"),
        (LargeRefused("x", status=401), "status 401"),
        (LargeRefused("x"), "refused"),
        (LargeError("x"), "failed"),
    ],
)
def test_kinds(error: LargeError, kind: str) -> None:
    assert failure_kind(error) == kind


@pytest.mark.parametrize("mode", ["wait", "overlap", "hedge", "auto"])
def test_each_kind_is_reported_once_and_counted(mode: str) -> None:
    steps: list[bytes | LargeError] = [b"a", KEY_GONE, b"b", KEY_GONE, NO_MODEL, TOO_LONG, KEY_GONE]
    reported: list[CallFailure] = []
    answer = generate(
        ScriptedSmall(b"hello w", entropies=dict.fromkeys(range(7), 2.0)),
        ScriptedLarge(steps),
        "hi",
        router=EntropyRouter(1.0),
        mode=mode,
        on_failure=reported.append,
    )
    for token in answer:
        if token.index == 1:
            # Not only at the end of the answer.
            assert [failure.kind for failure in reported] == ["status 401"]
    assert [(failure.kind, failure.reason) for failure in reported] == [
        ("status 401", str(KEY_GONE)),
        ("status 404", str(NO_MODEL)),
        ("status 413", str(TOO_LONG)),
    ]
    stats = answer.stats()
    assert [(failure.kind, failure.count) for failure in stats.failures] == [
        ("status 401", 3),
        ("status 404", 1),
        ("status 413", 1),
    ]
    assert (stats.fallbacks, stats.unchecked) == (5, 5)


def answer_with(
    replies: Sequence[bytes | LargeError],
    *,
    seconds: float = 0.0,
    strict: bool = False,
    experience: Experience | None = None,
) -> Answer:
    """Return an answer of four uncertain positions whose calls take `seconds` each."""
    clock = FakeClock()
    return Answer(
        ScriptedSmall(b"abcd", entropies=dict.fromkeys(range(4), 2.0)),
        ScriptedLarge(replies, clock=clock, seconds=seconds),
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(1.0),
        options=Options(timeout_s=10.0, mode=Mode.WAIT, strict=strict),
        experience=experience,
        clock=clock,
    )


@pytest.mark.parametrize(
    "error",
    [
        LargeUnavailable("calls to http://box/v1 are paused; last failure: answered 401"),
        LargeUnrecorded("the ledger cannot be written"),
    ],
)
def test_calls_that_are_not_made_have_a_reason_and_do_not_count(error: LargeError) -> None:
    experience = Experience()
    answer = answer_with([error, error, b"x"], experience=experience)
    list(answer)
    stats = answer.stats()
    (failure,) = stats.failures
    assert (failure.kind, failure.count, failure.was_called) == (failure_kind(error), 2, False)
    assert failure.reason == str(error)
    assert (stats.calls, stats.escalated, stats.fallbacks) == (2, 2, 0)
    assert experience.started_calls == experience.escalated_positions == 2


def test_a_prompt_that_cannot_be_sent_is_no_call() -> None:
    answer = answer_with([b"x", LargeUnsendable("too long")])
    list(answer)
    stats = answer.stats()
    assert [(failure.count, failure.was_called) for failure in stats.failures] == [(3, False)]
    assert (stats.calls, stats.unchecked, stats.fallbacks) == (1, 3, 0)


def test_positions_after_the_answers_time_for_failures_say_so() -> None:
    answer = answer_with([LargeTimeout("late")], seconds=10.0)
    list(answer)
    stats = answer.stats()
    assert [(failure.kind, failure.count) for failure in stats.failures] == [
        ("timeout", 1),
        ("no time left", 3),
    ]
    assert "10 s of waiting" in stats.failures[1].reason
    assert stats.failures[1].parameter == "timeout_s"
    assert (stats.fallbacks, stats.unchecked) == (1, 4)


def test_replies_that_do_not_go_on_cost_none_of_the_time_for_failures() -> None:
    answer = answer_with([LargeNotContinued("elsewhere")], seconds=10.0)
    list(answer)
    stats = answer.stats()
    assert [(failure.kind, failure.count) for failure in stats.failures] == [("not continued", 4)]


@pytest.mark.parametrize(
    "refusal",
    [
        LargeUnsendable("the prompt has reached the large model's context"),
        LargeRefused("this exceeds the available context size", status=400),
    ],
)
def test_a_prompt_that_is_too_long_is_sent_once(refusal: LargeError) -> None:
    large = ScriptedLarge([b"x", refusal])
    small = ScriptedSmall(b"abcd", entropies=dict.fromkeys(range(4), 2.0))
    reported: list[CallFailure] = []
    router = EntropyRouter(1.0)
    answer = generate(small, large, "hi", router=router, mode="wait", on_failure=reported.append)
    assert "".join(token.text for token in answer) == "xbcd"
    assert len(large.contexts) == 2
    stats = answer.stats()
    kind = failure_kind(refusal)
    failures = [(failure.kind, failure.count, failure.was_called) for failure in stats.failures]
    if refusal.was_called:
        assert failures == [(kind, 1, True), (kind, 2, False)]
        assert "1 failed call (status 400), 2 calls not made (status 400)" in summary_line(stats)
    else:
        assert failures == [(kind, 3, False)]
    assert [failure.kind for failure in reported] == [kind]
    with pytest.raises(type(refusal)):
        list(answer_with([b"x", refusal], strict=True))


def test_a_strict_answer_never_goes_on_without_the_large_model() -> None:
    with pytest.raises(LargeTimeout):
        list(answer_with([LargeTimeout("late")], seconds=10.0, strict=True))
    # The failed attempts inside a successful call have used up the time.
    clock = FakeClock()
    answer = Answer(
        ScriptedSmall(b"abcd", entropies=dict.fromkeys(range(4), 2.0)),
        ScriptedLarge([b"x"], clock=clock, seconds=9.9, lost_s=9.9),
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(1.0),
        options=Options(timeout_s=10.0, mode=Mode.WAIT, strict=True),
        clock=clock,
    )
    with pytest.raises(AllowanceUsed):
        list(answer)


def test_an_answer_without_a_failure_has_none() -> None:
    answer = answer_with([b"x"])
    list(answer)
    assert answer.stats().failures == ()
