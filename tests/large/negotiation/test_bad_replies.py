"""Single bad replies in a negotiation: they decide nothing, so later texts do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from mlxroute.errors import LargeError
from mlxroute.large import LargeModel
from mlxroute.large.http import exchange
from tests.support import family_servers
from tests.support.chaos import shorten_pauses
from tests.support.family_servers import FamilyServer
from tests.support.loopback import Loopback, Reply, Request
from tests.support.vocabularies import context

_TEXT: Final = "1, 2, 3,"
POSITION: Final = context(
    _TEXT, family_servers.VOCABULARY, answer=family_servers.VOCABULARY.encode(_TEXT)
)
REFUSAL: Final = Reply.of({"error": "unknown field"}, status=400)
BAD_REPLIES: Final = {
    "an empty body": Reply(b""),
    "half of the JSON": Reply(b'{"content": "ap'),
    "a page": Reply(b"<html>gateway</html>"),
    "an empty object": Reply(b"{}"),
    "null": Reply(b"null"),
    "an error with status 200": Reply.of({"error": "overloaded"}),
    "100 Continue alone": Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "no HTTP": Reply(raw=b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a closed connection": Reply(cut_at=0),
    "status 500": Reply(b"oops", status=500),
    "too long": Reply(b" " * (1 << 16), times=2),
}
every_bad_reply = pytest.mark.parametrize("bad", BAD_REPLIES)
# With ids and tokenise routes; with text alone.
# Of the default run, each kind at every third request; the kinds begin at different ones.
every_third = pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.heavy)])
both_kinds = pytest.mark.parametrize("family", ["llama-server", "mlx_lm"])
_UNREADABLE: Final = ("an empty body", "no HTTP", "status 500")
_ONE_OF_EACH_KIND: Final = (*_UNREADABLE, "an empty object", "an error with status 200")


class Disturbed:
    """The `answer` of an honest server, with some replies replaced, counted from `plan` on."""

    def __init__(self, honest: Callable[[Request], Reply]) -> None:
        self.honest = honest
        self.plan(REFUSAL, range(0))

    def plan(self, bad: Reply, numbers: range) -> None:
        self._bad, self._numbers, self.requests = bad, numbers, 0

    def __call__(self, request: Request) -> Reply:
        number, self.requests = self.requests, self.requests + 1
        return self._bad if number in self._numbers else self.honest(request)


@pytest.fixture(autouse=True)
def _short_pauses(short_retry_pauses: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_pauses(monkeypatch, 0.0)
    monkeypatch.setattr(exchange, "MAX_REPLY_BYTES", 1 << 16)


def state(large: LargeModel) -> tuple[object, ...]:
    """Return what decides how the server is asked and how its tokens are read."""
    pairing = large._negotiator.pairing
    assert pairing is not None
    tokens = pairing.builder.tokens
    return (pairing.dialect.name, pairing.comparison, type(tokens), pairing.model)


def call_until_answered(large: LargeModel, *, calls: int = 6) -> None:
    for _ in range(calls):
        try:
            large.next_token(POSITION)
        except LargeError:
            continue
        return
    pytest.fail("no call was answered")


def forget_dialect(large: LargeModel, server: Disturbed) -> None:
    """Let two calls be refused, so that the next one negotiates anew."""
    server.plan(REFUSAL, range(1000))
    while large.connected:
        with pytest.raises(LargeError):
            large.next_token(POSITION)


@both_kinds
@every_bad_reply
@every_third
def test_a_bad_reply_in_a_renegotiation_does_not_change_the_dialect(
    family: str, bad: str, step: int
) -> None:
    server = Disturbed(FamilyServer(family))
    with Loopback(server) as loopback, LargeModel(loopback.url) as large:
        call_until_answered(large)
        before = state(large)
        forget_dialect(large, server)
        server.plan(REFUSAL, range(0))
        call_until_answered(large)
        # The list of models, the sample of the tokenise routes, the check, the comparison.
        count = server.requests
        assert state(large) == before
        for number in range([*BAD_REPLIES].index(bad) % step, count, step):
            forget_dialect(large, server)
            server.plan(BAD_REPLIES[bad], range(number, number + 1))
            call_until_answered(large)
            assert state(large) == before, number


@both_kinds
@pytest.mark.parametrize("bad", _UNREADABLE)
def test_many_unreadable_replies_in_a_renegotiation_do_not_change_the_dialect(
    family: str, bad: str
) -> None:
    server = Disturbed(FamilyServer(family))
    with Loopback(server) as loopback, LargeModel(loopback.url) as large:
        call_until_answered(large)
        before = state(large)
        for first in range(6):
            forget_dialect(large, server)
            server.plan(BAD_REPLIES[bad], range(first, first + 9))
            call_until_answered(large, calls=20)
            assert state(large) == before, first


@pytest.mark.parametrize("bad", _UNREADABLE)
def test_unreadable_replies_alone_do_not_make_a_server_forgotten(bad: str, tmp_path: Path) -> None:
    server, verdicts = Disturbed(FamilyServer("vllm")), tmp_path / "verdicts.json"
    with Loopback(server) as loopback, LargeModel(loopback.url, verdicts=verdicts) as large:
        large.connect()
        call_until_answered(large)
        before, saved = state(large), verdicts.read_bytes()
        server.plan(BAD_REPLIES[bad], range(1000))
        for _ in range(4):
            with pytest.raises(LargeError):
                large.next_token(POSITION)
        server.plan(REFUSAL, range(0))
        call_until_answered(large)
        assert state(large) == before
        assert verdicts.read_bytes() == saved


@both_kinds
@pytest.mark.parametrize("bad", _ONE_OF_EACH_KIND)
def test_a_bad_reply_while_probing_does_not_change_the_verdict(family: str, bad: str) -> None:
    server = Disturbed(FamilyServer(family))
    with Loopback(server) as loopback:
        with LargeModel(loopback.url) as large:
            undisturbed = large.probe()
        # Each kind of reply at every fifth request, and so one of them at each request.
        for number in range(_ONE_OF_EACH_KIND.index(bad), server.requests, 5):
            server.plan(BAD_REPLIES[bad], range(number, number + 1))
            with LargeModel(loopback.url) as large:
                verdict = large.probe()
            expected = (undisturbed.dialect, undisturbed.model, undisturbed.token_source)
            assert (verdict.dialect, verdict.model, verdict.token_source) == expected, number


def test_a_server_of_another_family_gets_its_own_dialect() -> None:
    server = Disturbed(FamilyServer("vllm"))
    with Loopback(server) as loopback, LargeModel(loopback.url) as large:
        call_until_answered(large)
        server.honest = FamilyServer("mlx_lm")
        call_until_answered(large)
        assert state(large)[0] == "mlx_lm completions"


def test_a_comparison_that_fails_is_made_again() -> None:
    """Vocabularies that count as different for a whole session would change its answers."""
    vllm = FamilyServer("vllm")
    is_down = True

    def answer(request: Request) -> Reply:
        is_sample = request.path == "/detokenize" and len(request.json["tokens"]) < 20
        if is_down and request.path == "/detokenize" and not is_sample:
            return Reply(b"oops", status=503)
        return vllm(request)

    with Loopback(answer) as loopback, LargeModel(loopback.url) as large:
        large.connect()
        with pytest.raises(LargeError):
            large.pair_vocabulary(family_servers.VOCABULARY)
        is_down = False
        assert large.pair_vocabulary(family_servers.VOCABULARY)
