"""The delayed server: recorded replies, set delays."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import pytest
import requests

from mlxroute.bench.delayed_server import DELAYS, DelayedServer, lossy
from mlxroute.bench.plot import draw_latency
from mlxroute.cli.app import main
from tests.support.certificates import Authority
from tests.support.loopback import Loopback, Reply, Request


def echo(request: Request) -> Reply:
    return Reply.of({"path": request.path, "said": request.json["said"]})


def post(server: DelayedServer, word: str) -> requests.Response:
    return requests.post(f"{server.url}/completions", json={"said": word}, timeout=10)


def test_recorded_replies_outlive_the_server(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    with Loopback(echo) as upstream:
        with DelayedServer(upstream.url, record=record) as server:
            first = post(server, "a").json()
            assert first == {"path": "/v1/completions", "said": "a"}
            assert post(server, "a").json() == first
            assert (server.forwarded, len(upstream.requests)) == (1, 1)
        url = upstream.url
    with DelayedServer(url, record=record) as server:
        assert post(server, "a").json() == first
        assert server.forwarded == 0


def test_a_private_authority_is_trusted_if_named(tmp_path: Path) -> None:
    authority, record = Authority(tmp_path), tmp_path / "record.jsonl"
    with (
        Loopback(echo, tls=authority.server()) as upstream,
        DelayedServer(upstream.url, record=record, ca_bundle=authority.bundle) as server,
    ):
        assert post(server, "a").json()["said"] == "a"


def test_a_call_takes_the_set_time(tmp_path: Path) -> None:
    with (
        Loopback(echo) as upstream,
        DelayedServer(upstream.url, record=tmp_path / "record.jsonl") as server,
    ):
        server.delay_s = 0.3
        for _ in range(2):
            began_s = time.monotonic()
            post(server, "a")
            assert time.monotonic() - began_s >= 0.3


def test_further_tokens_take_the_set_time(tmp_path: Path) -> None:
    with (
        Loopback(echo) as upstream,
        DelayedServer(upstream.url, record=tmp_path / "record.jsonl") as server,
    ):
        server.delay_s, server.token_s = 0.01, 0.1
        began_s = time.monotonic()
        body = {"said": "a", "max_tokens": 4}
        requests.post(f"{server.url}/completions", json=body, timeout=10)
        assert time.monotonic() - began_s >= 0.31


def test_events_of_a_stream_arrive_at_the_set_times(tmp_path: Path) -> None:
    events = tuple(b'data: {"n": %d}\n\n' % number for number in range(4))
    with (
        Loopback(lambda request: Reply(chunks=events)) as upstream,
        DelayedServer(upstream.url, record=tmp_path / "record.jsonl") as server,
    ):
        server.delay_s, server.token_s = 0.1, 0.1
        for _ in range(2):
            began_s = time.monotonic()
            body = {"max_tokens": 3, "stream": True}
            reply = requests.post(f"{server.url}/completions", json=body, timeout=10, stream=True)
            arrivals = [(time.monotonic() - began_s, part) for part in reply.iter_content(None)]
            assert b"".join(part for _, part in arrivals) == b"".join(events)
            # The last event has the token counts only and is not delayed.
            assert all(t >= at for (t, _), at in zip(arrivals, (0.1, 0.2, 0.3), strict=False))
            assert arrivals[-1][0] >= 0.3
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("name", DELAYS)
def test_every_delay_has_a_mean_of_one(name: str) -> None:
    factors = [DELAYS[name](random.Random(i)) for i in range(20_000)]
    finite = [factor for factor in factors if factor != float("inf")]
    assert statistics.mean(finite) == pytest.approx(1.0, rel=0.03)
    assert len(finite) == len(factors) or name == "lossy"


def test_a_lost_call_is_refused_once_and_answered_when_repeated(tmp_path: Path) -> None:
    with (
        Loopback(echo) as upstream,
        DelayedServer(upstream.url, record=tmp_path / "record.jsonl") as server,
    ):
        server.delay, server.delay_s = lossy, 0.001
        # Which words are lost depends on the words alone.
        codes = {word: post(server, word).status_code for word in map(str, range(30))}
        lost = [word for word, code in codes.items() if code == 503]
        assert 0 < len(lost) < 5
        assert all(post(server, word).status_code == 200 for word in lost)


@pytest.mark.parametrize(
    ("arguments", "said_so"),
    [
        ([], "--large URL"),
        (["--large", "http://127.0.0.1:9/v1", "--rate", "7"], "--rate must be between 0 and 1"),
        (["--large", "http://127.0.0.1:9/v1", "--ratio", "inf"], "--ratio above 0 and finite"),
    ],
)
def test_bench_latency_reports_missing_arguments(
    arguments: list[str], said_so: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", *arguments]) == 2
    assert said_so in capsys.readouterr().err


def test_the_plot_has_a_panel_for_each_rate(tmp_path: Path) -> None:
    points = [
        {"rate": rate, "ratio": ratio, "sides": {"wait": {"over_wait": 1.0}}}
        for rate in (0.03, 0.07)
        for ratio in (4.0, 34.0)
    ]
    report = {"small": "s", "large": "l", "delay": "constant", "points": points}
    sizes = []
    for count in (2, 4):
        path = tmp_path / f"{count}.png"
        draw_latency({**report, "points": points[:count]}, path)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(data[16:20]))
    assert sizes[1] == 2 * sizes[0]
