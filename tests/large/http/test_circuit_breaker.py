"""When the circuit breaker pauses the calls, and how a probe ends the pause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from mlxroute.errors import (
    LargeError,
    LargeNotContinued,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
    LargeUnreachable,
    LargeUnsendable,
)
from mlxroute.large import LargeModel
from mlxroute.large.http.circuit_breaker import FAILURES, CircuitBreaker
from tests.support import family_servers
from tests.support.connected_clients import VOCABULARY, legacy
from tests.support.family_servers import FamilyServer
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import honest, negotiated
from tests.support.scripted_models import FakeClock
from tests.support.vocabularies import context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


DOWN = LargeUnreachable("nobody there")


class Circuit:
    """A breaker on a clock of its own; counts the calls it admits."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.breaker = CircuitBreaker("http://host/v1", clock=self.clock)
        self.calls = 0

    def ask(
        self,
        error: BaseException | None = None,
        *,
        fragment: bool = False,
        forwarded: bool = False,
    ) -> str:
        """Make a call; return the name of its error, or an empty text."""
        try:
            with self.breaker.guard(fragment=fragment, forwarded=forwarded):
                self.calls += 1
                if error is not None:
                    raise error
        except (LargeError, KeyboardInterrupt) as exc:
            return type(exc).__name__
        return ""

    def open(self, error: LargeError = DOWN) -> None:
        for _ in range(FAILURES):
            self.ask(error)


def test_an_answer_to_a_call_that_was_not_counted_ends_the_pause() -> None:
    circuit = Circuit()
    circuit.open()
    assert circuit.ask() == "LargeUnavailable"
    circuit.breaker.end_pause()
    assert circuit.ask(DOWN) == "LargeUnreachable"


def test_the_pause_after_one_that_was_ended_is_longer() -> None:
    circuit = Circuit()
    circuit.open()
    circuit.breaker.end_pause()
    circuit.open()
    circuit.clock.now += 9
    assert circuit.ask() == "LargeUnavailable"
    circuit.clock.now += 2
    assert circuit.ask() == ""


def test_three_failures_in_a_row_stop_the_calls_and_say_why() -> None:
    circuit = Circuit()
    circuit.open()
    with (
        pytest.raises(LargeUnavailable, match=r"paused for another 5 s; .*nobody there"),
        circuit.breaker.guard(),
    ):
        pass
    assert circuit.calls == 3


def test_a_success_between_failures_keeps_the_calls_going() -> None:
    circuit = Circuit()
    for error in (DOWN, DOWN, None, DOWN, DOWN, None):
        circuit.ask(error)
    assert circuit.ask() == ""
    assert circuit.calls == 7


def test_after_a_pause_one_probe_is_admitted_and_its_success_ends_the_pause() -> None:
    circuit = Circuit()
    circuit.open()
    circuit.clock.now += 4.9
    assert circuit.ask() == "LargeUnavailable"
    circuit.clock.now += 0.2
    with circuit.breaker.guard():
        # No other call is admitted while it is in flight.
        assert circuit.ask() == "LargeUnavailable"
    assert [circuit.ask(), circuit.ask(DOWN), circuit.ask(DOWN), circuit.ask()] == [
        *("", "LargeUnreachable", "LargeUnreachable", "")
    ]


def test_pauses_double_up_to_five_minutes_and_begin_anew_after_a_success() -> None:
    circuit = Circuit()
    circuit.open()
    lengths = []
    for _ in range(9):
        began = circuit.clock.now
        while circuit.ask(DOWN) == "LargeUnavailable":
            circuit.clock.now += 1
        lengths.append(circuit.clock.now - began)
    assert lengths == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    circuit.clock.now += 300
    circuit.ask()
    circuit.open()
    circuit.clock.now += 5
    assert circuit.ask() == ""


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_permanent_refusal_makes_the_longest_pause(status: int) -> None:
    circuit = Circuit()
    circuit.open(LargeRefused("no", status=status))
    circuit.clock.now += 299
    assert circuit.ask() == "LargeUnavailable"
    circuit.clock.now += 1
    assert circuit.ask() == ""


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_too_long_is_no_failure(status: int) -> None:
    circuit = Circuit()
    circuit.open(LargeRefused("this exceeds the model's context length", status=status))
    assert circuit.ask() == ""
    circuit.open(LargeRefused("no such field", status=status))
    assert circuit.ask() == "LargeUnavailable"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."
            " Given: 4090 `inputs` tokens and 20 `max_new_tokens`",
            True,
        ),
        ("Input validation error: `inputs` must have less than 1024 tokens. Given: 1500", True),
        ("Please reduce the length of the messages or completion.", True),
        (
            "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
            True,
        ),
        ("This model's maximum context length is 4096 tokens. However, you requested 9", True),
        ("Context size has been exceeded.", True),
        ("Range of input length should be [1, 129024]", True),
        ("Input validation error: `max_new_tokens` must be <= 512. Given: 600", False),
        ("Input validation error: `inputs` cannot be empty", False),
        ("`max_new_tokens` must be strictly positive", False),
        ("logprobs must be less than 5", False),
        ("messages: at least one message is required", False),
        ("the length of the messages must be odd", False),
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_the_words_of_the_server(
    reason: str, *, expected: bool
) -> None:
    host = "api.example" if expected else "context.example"
    for status in (400, 413, 422):
        message = f"https://{host}/v1 answered {status}: {reason}"
        assert LargeRefused(message, status=status).is_too_long is expected
    assert not LargeRefused(reason, status=500).is_too_long


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (LargeRefused("bad tools", status=400), False),
        (LargeRefused("no such route", status=404), False),
        (LargeRefused("bad tools", status=422), False),
        (LargeRefused("broken by it", status=500), False),
        (LargeRefused("fewer max_tokens", status=402), False),
        (LargeRefused("flagged", status=403), False),
        *((LargeRefused("too slow", status=status), False) for status in (408, 504, 520, 524)),
        (LargeProtocolError("too long"), False),
        (LargeTimeout("too slow"), False),
        (LargeRefused("busy", status=429), True),
        *((LargeRefused("down", status=status), True) for status in (503, 521, 522, 523, 529)),
        (LargeRefused("wrong key", status=401), True),
        (DOWN, True),
    ],
)
def test_what_a_forwarded_request_may_cause_is_no_failure(error: LargeError, pauses: bool) -> None:
    circuit = Circuit()
    for _ in range(FAILURES):
        circuit.ask(error, forwarded=True)
    assert circuit.ask() == ("LargeUnavailable" if pauses else "")


def test_a_retry_after_sets_the_pause_up_to_an_hour() -> None:
    circuit = Circuit()
    circuit.ask(LargeRefused("busy", status=429, retry_after_s=20.0))
    circuit.clock.now += 19
    assert circuit.ask() == "LargeUnavailable"
    circuit.clock.now += 1
    # The probe after any pause decides alone, however few failures came before.
    assert circuit.ask(DOWN) == "LargeUnreachable"
    assert circuit.ask() == "LargeUnavailable"
    circuit.clock.now += 10
    assert circuit.ask(LargeRefused("busy", status=429, retry_after_s=1e9)) == "LargeRefused"
    circuit.clock.now += 3600
    assert circuit.ask() == ""


def test_a_misfit_inside_a_character_does_not_count_as_a_failure() -> None:
    circuit, unfit = Circuit(), LargeProtocolError("another character")
    for _ in range(5):
        circuit.ask(unfit, fragment=True)
    assert circuit.ask() == ""
    circuit.open(unfit)
    assert circuit.ask() == "LargeUnavailable"


def test_replies_that_do_not_go_on_with_the_answer_pause_no_calls() -> None:
    circuit = Circuit()
    for _ in range(FAILURES + 1):
        assert circuit.ask(LargeNotContinued("elsewhere")) == "LargeNotContinued"
    assert circuit.ask() == ""


@pytest.mark.parametrize("end", [KeyboardInterrupt(), LargeUnavailable("not now")])
def test_a_probe_without_an_outcome_leaves_the_probing_to_the_next_call(end: BaseException) -> None:
    circuit = Circuit()
    circuit.open()
    circuit.clock.now += 5
    assert circuit.ask(end) == type(end).__name__
    assert circuit.ask() == ""


def test_a_forwarded_request_that_probes_keeps_out_its_own_kind_alone() -> None:
    circuit = Circuit()
    circuit.open()
    circuit.clock.now += 5
    with contextlib.suppress(LargeUnreachable), circuit.breaker.guard(forwarded=True):
        assert circuit.ask(forwarded=True) == "LargeUnavailable"
        assert circuit.ask() == ""
        raise DOWN
    # The pause had ended, so that one failure is one of three.
    assert circuit.ask() == ""


def test_a_call_from_before_the_pause_does_not_lengthen_it() -> None:
    circuit = Circuit()
    with contextlib.suppress(LargeUnreachable), circuit.breaker.guard():
        circuit.open()
        raise DOWN
    circuit.clock.now += 5
    assert circuit.ask() == ""


def test_all_calls_of_a_large_model_share_a_breaker() -> None:
    with (
        Loopback(lambda request: Reply(b"{}")) as server,
        negotiated(LargeModel(server.url, model="m")) as large,
    ):
        for _ in range(3):
            with pytest.raises(LargeProtocolError):
                large.next_token(context("x", VOCABULARY))
        made = len(server.requests)
        with pytest.raises(LargeUnavailable):
            large.next_token(context("x", VOCABULARY))
        with pytest.raises(LargeUnavailable):
            large.connect()
        assert len(server.requests) == made


def test_prompts_longer_than_the_known_context_pause_no_calls() -> None:
    answer = FamilyServer("llama-server")

    def with_context_length(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": [{"id": "m", "meta": {"n_ctx": 64}}]})
        return answer(request)

    vocabulary = family_servers.VOCABULARY
    text = "pineapple " * 40
    asked = context(text, vocabulary, answer=vocabulary.encode(text))
    with Loopback(with_context_length) as server, LargeModel(server.url) as large:
        assert large.pair_vocabulary(vocabulary)
        for _ in range(FAILURES + 1):
            with pytest.raises(LargeUnsendable, match="context of 64 tokens"):
                large.next_token(asked)


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_access_pauses_the_calls_at_once(status: int) -> None:
    circuit = Circuit()
    assert circuit.ask(LargeRefused("no", status=status)) == "LargeRefused"
    assert circuit.ask() == "LargeUnavailable"
    assert circuit.calls == 1
    circuit.clock.now += 300
    assert circuit.ask() == ""


def test_a_wrong_address_pauses_the_calls_after_three_failures() -> None:
    circuit = Circuit()
    missing = LargeRefused("no such route", status=404)
    assert [circuit.ask(missing), circuit.ask(missing), circuit.ask()] == ["LargeRefused"] * 2 + [
        ""
    ]


def test_a_wrong_key_is_tried_once_not_at_every_position() -> None:
    with (
        Loopback(lambda request: Reply(b'{"error": "bad key"}', status=401)) as server,
        LargeModel(server.url, model="m", api_key="sk-secret") as large,
    ):
        with pytest.raises(LargeRefused, match="check the API key"):
            large.connect()
        made = []
        for _ in range(3):
            with pytest.raises(LargeUnavailable, match="check the API key"):
                large.next_token(context("x", VOCABULARY))
            made.append(len(server.requests))
    assert made[0] == made[1] == made[2]


def test_a_dialect_that_keeps_failing_is_negotiated_again_within_a_call() -> None:
    wrong = [Reply(b'{"choices": [{"text": 3}]}'), Reply(b'{"error": "no such route"}', status=404)]

    def play(request: Request) -> Reply:
        return wrong.pop() if wrong else Reply.of(legacy("a"))

    with (
        Loopback(honest(play)) as server,
        negotiated(LargeModel(server.url, model="m")) as large,
    ):
        for _ in range(2):
            with pytest.raises((LargeRefused, LargeProtocolError)):
                large.next_token(context("x", VOCABULARY))
        assert not large.connected
        assert large.next_token(context("x", VOCABULARY)).text == "a"
        assert large.connected
