"""Many answers with a fault in each: complete, without the key, without leaks."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import random
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from typing import Any, Final

import psutil
import pytest
from rich.console import Console

from mlxroute.cli.json_lines import token_object, write_object
from mlxroute.cli.terminal import show_answer
from mlxroute.engine import Answer, Options
from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnavailable,
    LargeUnreachable,
    LargeUnreadable,
)
from mlxroute.large import LargeModel
from mlxroute.large.http import retry
from mlxroute.large.http.transport import MAX_HANGING
from mlxroute.routers import EntropyRouter
from mlxroute.types import LargeContext, LargeToken, Mode, Source, StopReason, Token, Uploads
from tests.support.certificates import Authority
from tests.support.connected_clients import legacy
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import honest, negotiated
from tests.support.scripted_models import FakeCall, ScriptedSmall

KEY: Final = "sk-do-not-show-5f1c"
SMALL: Final = b"the small model says this"
LARGE: Final = "L"
LATE: Final = "Z"
GOOD: Final = honest(lambda request: Reply.of(legacy(LARGE)))
_MB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what the server sends, and the outcomes it may have (None: a token).

    A fault that `passes` ends with a retry; a `slow` one lasts until the deadline. A fault without
    a reply is one of the network.
    """

    name: str
    reply: Reply | None
    outcomes: tuple[type[LargeError] | None, ...]
    passes: bool = False
    slow: bool = False


def _changed(**changes: Any) -> Reply:
    return Reply.of(legacy(LARGE, **changes))


def _logprob(value: str) -> Reply:
    return Reply(json.dumps(legacy(LARGE)).replace("-0.5", value).encode())


def _page(status: int, **headers: str) -> Reply:
    body = f"<html>the proxy was sent Authorization: Bearer {KEY}</html>".encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(body, status=status, headers=named)


def _echo(status: int) -> Reply:
    return Reply.of({"error": {"message": f"Bearer {KEY}\x1b[2J is no good"}}, status=status)


_WHOLE = json.dumps(legacy(LARGE)).encode()
_REFUSED = (LargeRefused,)
_LOST = (LargeUnreachable,)
_UNFIT = (LargeProtocolError, LargeUnreadable)
FAULTS: Final = (
    Fault("refused", None, _LOST),
    Fault("reset before the reply", Reply(_WHOLE, cut_at=0, reset=True), _LOST, passes=True),
    Fault("reset mid-body", Reply(_WHOLE, cut_at=150, reset=True), _LOST, passes=True),
    Fault("closed mid-body", Reply(_WHOLE, cut_at=150), _LOST, passes=True),
    Fault("stalled before headers", Reply(stall_s=30), (LargeTimeout,), slow=True),
    Fault("a byte a second", Reply(_WHOLE, byte_every_s=1.0), (LargeTimeout,), slow=True),
    Fault("late", replace(Reply.of(legacy(LATE)), stall_s=0.2), (LargeTimeout,), slow=True),
    Fault("401", _echo(401), _REFUSED),
    Fault("403", _echo(403), _REFUSED),
    Fault("404", _echo(404), _REFUSED),
    Fault("408", _echo(408), _REFUSED, passes=True),
    Fault("429", _echo(429), _REFUSED, passes=True),
    Fault("429 in seconds", _page(429, Retry_After="3600"), _REFUSED),
    Fault("429 by date", _page(429, Retry_After=formatdate(4e9, usegmt=True)), _REFUSED),
    Fault("500", _echo(500), _REFUSED, passes=True),
    Fault("502 page", _page(502), _REFUSED, passes=True),
    Fault("503", _page(503), _REFUSED, passes=True),
    Fault("200 with an error", _echo(200), _REFUSED),
    Fault("empty choices", Reply(b'{"choices": []}'), _UNFIT),
    Fault("missing logprobs", _changed(logprobs=None), (None, LargeProtocolError)),
    Fault("null text", _changed(text=None), _UNFIT),
    Fault("wrong types", _changed(text=["L"], logprobs="none", finish_reason=7), _UNFIT),
    Fault("truncated JSON", Reply(_WHOLE[:-20]), _UNFIT),
    Fault("50 MB body", Reply(b" " * _MB, times=50), _UNFIT),
    Fault(
        "gzip bomb",
        Reply(gzip.compress(b" " * (50 * _MB)), headers={"Content-Encoding": "gzip"}),
        _UNFIT,
    ),
    Fault("invalid UTF-8", Reply(_WHOLE.replace(b'"L"', b'"\xff\xfe"')), _UNFIT),
    Fault("NUL and ANSI", Reply.of(legacy("a\x00\x1b[31;1m\x9b2Jb\x07")), (None, *_UNFIT)),
    Fault("NaN logprob", _logprob("NaN"), _UNFIT),
    Fault("positive logprob", _logprob("0.5"), _UNFIT),
    Fault("10,000-character token", Reply.of(legacy("x" * 10_000)), _UNFIT),
    Fault(
        "redirect to another host",
        Reply(status=307, headers={"Location": f"http://evil.example/v1?key={KEY}"}),
        _REFUSED,
    ),
    Fault("wrong certificate", None, _LOST),
)


class Stage:
    """Two servers, one with TLS, that answer correctly except while a fault is played."""

    def __init__(self, authority: Authority, stranger: Authority) -> None:
        self.played: Counter[str] = Counter()
        self._good, self._bad = authority.server(), stranger.server()
        self._fault: Fault | None = None
        self._left = 0
        self.plain = Loopback(self._reply)
        self.tls = Loopback(self._reply, tls=self._good)

    def close(self) -> None:
        self.plain.close()
        self.tls.close()

    def _reply(self, request: Request) -> Reply:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        fault = self._fault
        if fault is None or fault.reply is None or self._left == 0:
            return GOOD(request)
        self._left -= 1
        self.played[fault.name] += 1
        return fault.reply

    @contextlib.contextmanager
    def playing(self, fault: Fault, *, times: int) -> Iterator[None]:
        """Play a fault for the next requests; one of the network itself for all of them."""
        self._fault, self._left = fault, times
        self.played[fault.name] += fault.reply is None
        try:
            if fault.name == "refused":
                with self.plain.gone():
                    yield
            elif fault.name == "wrong certificate":
                self.tls.tls = self._bad
                self.tls.hang_up()
                yield
                self.tls.hang_up()
            else:
                yield
        finally:
            self._fault, self.tls.tls = None, self._good


class Faulty:
    """A large model with a fault on some calls; records the outcome of every call."""

    def __init__(self, large: LargeModel, stage: Stage, fault: Fault) -> None:
        self.large = large
        self.outcomes: list[LargeToken | LargeError] = []
        self.errors: list[LargeError] = []
        # Call -> the number of requests that the fault lasts for.
        self.plan: dict[int, int] = {}
        # The calls that had to negotiate the dialect again.
        self.negotiating_calls: set[int] = set()
        self._stage = stage
        self._fault = fault

    @property
    def uploads(self) -> Uploads:
        return self.large.uploads

    @property
    def is_local(self) -> bool:
        return False

    @property
    def max_in_flight(self) -> int:
        return 1

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> FakeCall:
        times = self.plan.get(len(self.outcomes))
        if not self.large.connected:
            self.negotiating_calls.add(len(self.outcomes))
        playing = self._stage.playing(self._fault, times=times) if times else None
        outcome: LargeToken | LargeError
        try:
            with playing or contextlib.nullcontext():
                outcome = self.large.next_token(context, deadline_s=deadline_s)
        except LargeError as exc:
            outcome = exc
            self.errors.append(exc)
        self.outcomes.append(outcome)
        return FakeCall(outcome, ready_s=0.0, clock=None)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        assert ready()


@dataclass(frozen=True, slots=True)
class Played:
    """An answer that was decoded, and all text that could show the key."""

    fault: Fault
    tokens: list[Token]
    answer: Answer
    faulty: Faulty
    output: str


class _Recorded:
    """An answer that records its tokens."""

    def __init__(self, answer: Answer) -> None:
        self.stats = answer.stats
        self.tokens: list[Token] = []
        self._answer = answer

    def __iter__(self) -> Iterator[Token]:
        for token in self._answer:
            self.tokens.append(token)
            yield token


def play(stage: Stage, authority: Authority, fault: Fault, rng: random.Random) -> Played:
    """Decode one answer with a fault at a random position, for one request or for many."""
    server = stage.tls if fault.name == "wrong certificate" else stage.plain
    escalated = rng.sample(range(len(SMALL)), 5)
    first, count = rng.randrange(5), rng.choice((1, 1, 5))
    large = LargeModel(server.url, model="m", api_key=KEY, ca_bundle=authority.bundle)
    with negotiated(large):
        faulty = Faulty(large, stage, fault)
        faulty.plan = {call: rng.choice((1, 100)) for call in range(first, first + count)}
        answer = Answer(
            ScriptedSmall(SMALL, entropies=dict.fromkeys(escalated, 2.0)),
            faulty,
            [{"role": "user", "content": "hi"}],
            router=EntropyRouter(1.0),
            # Long enough that a busy machine causes no timeouts of its own.
            options=Options(timeout_s=0.08 if fault.slow else 30.0, mode=Mode.WAIT),
        )
        recorded, out, err = _Recorded(answer), io.StringIO(), io.StringIO()
        consoles = {"out": Console(file=out), "err": Console(file=err)}
        show_answer(recorded, heat=False, threshold=1.0, **consoles)  # type: ignore[arg-type]
        for token in recorded.tokens:
            write_object(token_object(token), out)
        output = [out.getvalue(), err.getvalue(), repr(large), repr(vars(large))]
        output += [_everything(error, fault) for error in faulty.errors]
    return Played(fault, recorded.tokens, answer, faulty, "".join(output))


def _everything(error: BaseException, fault: Fault) -> str:
    """An exception with its causes and frames, and the frames' variables if those hold no echo."""
    echoes = fault.reply is not None and KEY.encode() in fault.reply.body
    formatted = traceback.TracebackException.from_exception(error, capture_locals=not echoes)
    return "".join(formatted.format()) + repr(error)


def check(played: Played) -> None:
    """Check everything that holds for every answer."""
    stats, tokens, fault = played.answer.stats(), played.tokens, played.fault
    assert stats.finish_reason is StopReason.EOS
    # A failed call leaves the small model's token; an answered one gives the large model's.
    made = [o for o in played.faulty.outcomes if not isinstance(o, LargeUnavailable)]
    calls = [token for token in tokens if token.escalation is not None]
    for token, outcome in zip(calls, made, strict=True):
        assert token.escalation is not None
        assert token.escalation.large is (None if isinstance(outcome, LargeError) else outcome)
        assert token.checked is (token.source is Source.LARGE) is isinstance(outcome, LargeToken)
    unchecked = [token for token in tokens if not token.checked]
    assert all(token.token_id == token.signals.token_id for token in unchecked)
    failed = [o for o in made if isinstance(o, LargeError)]
    assert (stats.fallbacks, stats.unchecked) == (len(failed), len(unchecked))
    assert stats.escalated == len(made) - len(failed)
    assert LATE not in stats.text
    # A timeout uses up the time for all calls, so it ends them.
    assert not any(isinstance(o, LargeTimeout) for o in made[:-1])
    for call, outcome in enumerate(played.faulty.outcomes):
        if (times := played.faulty.plan.get(call)) is None:
            expected: tuple[type[LargeError] | None, ...] = (None,)
        else:
            expected = (None,) if fault.passes and times == 1 else fault.outcomes
            if fault.slow and times == 1:
                # A silent connection that was used before is doubted, and a new one answers.
                expected = (*expected, None)
        if call in played.faulty.negotiating_calls:
            # A request of the negotiation may get the fault instead, or no dialect may work.
            expected = (*expected, None, LargeProtocolError)
        kind = type(outcome) if isinstance(outcome, LargeError) else None
        # The circuit breaker may be open; a busy machine adds timeouts to the slow faults.
        assert kind in (*expected, LargeUnavailable) or (fault.slow and kind is LargeTimeout), (
            outcome
        )
    assert KEY not in played.output
    text, _, _ = played.output.partition('{"type"')
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    for error in played.faulty.errors:
        assert str(error).isprintable()
        assert len(str(error)) < 1000


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlxroute-exchange"]


@pytest.mark.parametrize("rounds", [4, pytest.param(16, marks=pytest.mark.heavy)])
def test_every_answer_survives_every_fault(
    rounds: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)
    caplog.set_level(logging.DEBUG)
    authority = Authority(tmp_path_factory.mktemp("authority"))
    stage = Stage(authority, Authority(tmp_path_factory.mktemp("stranger")))
    rng, order = random.Random(0), [*FAULTS] * rounds
    rng.shuffle(order)
    process, warm, renegotiations = psutil.Process(), 0, 0
    try:
        for number, fault in enumerate(order):
            played = play(stage, authority, fault, rng)
            check(played)
            calls = enumerate(played.faulty.outcomes)
            renegotiations += any(
                call in played.faulty.negotiating_calls and isinstance(outcome, LargeToken)
                for call, outcome in calls
            )
            assert len(our_threads()) <= MAX_HANGING
            assert stage.plain.sent_bytes < 20 * _MB * stage.played["50 MB body"] + 1
            if number == len(order) // 4:
                warm = process.memory_info().rss
    finally:
        stage.close()
    assert process.memory_info().rss - warm < 40 * _MB
    assert renegotiations
    assert all(stage.played[fault.name] >= rounds * 5 // 8 for fault in FAULTS)
    for thread in our_threads():
        thread.join(10)
        assert not thread.is_alive()
    assert "urllib3" in caplog.text
    assert KEY not in caplog.text
