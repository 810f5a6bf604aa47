"""A server that fails during a negotiation: one clear error, and no verdict."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from mlxroute.cli import main
from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    LargeUnreachable,
)
from mlxroute.large import LargeModel
from mlxroute.large.http import exchange, retry
from tests.support.connected_clients import legacy, save_verdict
from tests.support.loopback import Loopback, Reply, Request
from tests.support.negotiated import honest

KEY: Final = "sk-do-not-keep-3c9e"
FAULTS: Final = {
    "refused": (Reply(cut_at=0, reset=True), LargeUnreachable),
    "401": (Reply.of({"error": f"Bearer {KEY}?"}, status=401), LargeRefused),
    "429": (Reply(status=429, headers={"Retry-After": "1800"}), LargeRefused),
    "503": (Reply(b"overloaded", status=503), LargeError),
    "stalled": (Reply(stall_s=30), LargeTimeout),
    "50 MB": (Reply(b" " * (1 << 20), times=50), LargeProtocolError),
    "truncated": (Reply(b'{"choices": [{"text": "app'), LargeProtocolError),
}
every_fault = pytest.mark.parametrize("fault", FAULTS)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)
    # A negotiation reads up to the limit for each of its requests.
    monkeypatch.setattr(exchange, "MAX_REPLY_BYTES", 1 << 16)


def failing(after: int, fault: Reply) -> Callable[[Request], Reply]:
    """Return an honest server that has a fault after this many requests."""
    answer = honest(lambda request: Reply.of(legacy("a")))
    requests: list[Request] = []

    def fail(request: Request) -> Reply:
        requests.append(request)
        return answer(request) if len(requests) <= after else fault

    return fail


def connect(server: Loopback, verdicts: Path) -> LargeModel:
    """Connect with a timeout that fits a server that answers at once or never."""
    large = LargeModel(server.url, api_key=KEY, timeout_s=1.0, verdicts=verdicts)
    try:
        large.connect()
    finally:
        large.close()
    return large


# At once; in the first check; among the checks of the right dialect.
@pytest.mark.parametrize("after", [0, 6, 10])
@every_fault
def test_a_fault_while_probing_is_one_error_and_no_verdict(
    fault: str, after: int, tmp_path: Path
) -> None:
    reply, kind = FAULTS[fault]
    verdicts = tmp_path / "endpoints.json"
    with Loopback(failing(after, reply)) as server:
        with pytest.raises(kind) as caught:
            connect(server, verdicts)
        if kind is LargeTimeout:
            # The probe ends at the first timeout; one request may be repeated on a new connection.
            assert len(server.requests) <= after + 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert KEY not in str(caught.value)
    assert not verdicts.exists()


# At once; in the request that checks the remembered dialect.
@pytest.mark.parametrize("after", [0, 3])
@every_fault
def test_a_fault_while_a_verdict_is_checked_leaves_the_file_unchanged(
    fault: str, after: int, tmp_path: Path
) -> None:
    reply, kind = FAULTS[fault]
    verdicts = tmp_path / "endpoints.json"
    with Loopback(honest(lambda request: Reply.of(legacy("a")))) as server:
        connect(server, verdicts)
        before = verdicts.read_bytes()
        server.answer = failing(after, reply)
        with pytest.raises(kind):
            connect(server, verdicts)
        assert verdicts.read_bytes() == before
        server.answer = honest(lambda request: Reply.of(legacy("a")))
        server.requests.clear()
        assert connect(server, verdicts).connected
    # Models, two tokenise routes, one question.
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_proxy_that_forbids_what_is_outside_the_path_of_the_api_does_no_harm(
    status: int, tmp_path: Path
) -> None:
    answer = honest(lambda request: Reply.of(legacy("a")))

    def proxy(request: Request) -> Reply:
        if request.path.startswith("/v1/"):
            return answer(request)
        return Reply.of({"message": "Unauthorized"}, status=status)

    with Loopback(proxy) as server:
        for _ in range(2):
            assert connect(server, tmp_path / "endpoints.json").connected


def of_api_alone(other: Reply) -> Callable[[Request], Reply]:
    """Return a proxy that passes only the paths of the API to an honest server."""
    answer = honest(lambda request: Reply.of(legacy("a")))
    return lambda request: answer(request) if request.path.startswith("/v1/") else other


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_a_server_for_other_paths_does_no_harm(status: int, tmp_path: Path) -> None:
    """HAProxy without a default answers 503, nginx with an upstream that is down 502."""
    with Loopback(of_api_alone(Reply(b"<html>no server</html>", status=status))) as server:
        for _ in range(2):
            assert connect(server, tmp_path / "endpoints.json").connected


@pytest.mark.parametrize(
    "other", [Reply(status=503, headers={"Retry-After": "1800"}), Reply(status=429)]
)
def test_routes_that_are_expected_to_answer_later_are_not_taken_as_absent(
    other: Reply, tmp_path: Path
) -> None:
    with Loopback(of_api_alone(other)) as server, pytest.raises(LargeRefused):
        connect(server, tmp_path / "endpoints.json")
    assert not LargeRefused("http://box/v1 answered 503: Loading model", status=503).may_lack_route


@pytest.mark.parametrize("failures", [1, 9])
def test_an_error_in_a_body_is_known_by_its_code(failures: int, tmp_path: Path) -> None:
    """OpenRouter's reply while the provider behind it is overloaded."""
    left = [failures]
    limited = {"error": {"message": "Provider returned error: rate-limited", "code": 429}}

    def fail(request: Request) -> Reply:
        reply = answer(request)
        if request.path.endswith("/completions") and reply.status == 200 and left[0] > 0:
            left[0] -= 1
            return Reply.of(limited)
        return reply

    answer = honest(lambda request: Reply.of(legacy("a")))
    with Loopback(fail) as server:
        if failures == 1:
            assert connect(server, tmp_path / "endpoints.json").connected
        else:
            with pytest.raises(LargeRefused, match=r"answered 429: .* rate-limited"):
                connect(server, tmp_path / "endpoints.json")


@pytest.mark.parametrize("dialect", ["llama-server completion", "OpenAI completions"])
def test_a_key_that_is_refused_everywhere_leaves_a_remembered_verdict(
    dialect: str, tmp_path: Path
) -> None:
    verdicts = tmp_path / "endpoints.json"
    with Loopback(lambda request: Reply.of({"error": "wrong key"}, status=401)) as server:
        save_verdict(verdicts, url=server.url, model=None, dialect=dialect)
        before = verdicts.read_bytes()
        with pytest.raises(LargeRefused, match="wrong key; check the API key"):
            connect(server, verdicts)
    assert verdicts.read_bytes() == before


@every_fault
def test_probing_a_server_that_fails_is_one_line_and_exit_code_3(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, _ = FAULTS[fault]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Loopback(failing(8, reply)) as server:
        assert main(["probe", server.url, "--timeout", "2"]) == 3
    captured = capsys.readouterr()
    assert [line[:7] for line in captured.err.splitlines()] == ["error: "]
    assert KEY not in captured.out + captured.err
    assert not verdict_file().exists()


def test_a_probe_keeps_its_verdict_for_the_owner_alone_and_no_key_in_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answer = honest(lambda request: Reply.of(legacy("a")))

    def echo(request: Request) -> Reply:
        reply = answer(request)
        refusal = {"error": f"no: {request.headers['authorization']}"}
        return reply if reply.status == 200 else Reply.of(refusal, status=reply.status)

    with Loopback(echo) as server:
        assert main(["probe", server.url]) == 0
        sent = sum(bool(request.body) for request in server.requests)
    captured = capsys.readouterr()
    text = verdict_file().read_text(encoding="utf-8")
    assert "OpenAI completions" in captured.out
    assert captured.err.startswith(f"{sent} requests, ")
    assert "Bearer [key]" in text
    assert KEY not in text + captured.out + captured.err
    assert stat.S_IMODE(verdict_file().stat().st_mode) == 0o600


def verdict_file() -> Path:
    return Path(os.environ["MLXROUTE_CACHE_DIR"]) / "endpoints.json"
