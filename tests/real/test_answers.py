"""Answers of real models through a real server: faults, chats of several turns, JSON output."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.cli import main
from mlxroute.hosting.launcher import LocalServer
from mlxroute.large.http import circuit_breaker
from mlxroute.small import SmallModel
from mlxroute.types import Mode, Source, StopReason

TOKEN_KEYS = {
    *("type", "index", "id", "text", "source", "score", "entropy_nats", "margin", "small_id"),
    *("escalated", "checked", "large", "prefetched", "failure", "time_s"),
    *("threshold", "judgement", "accepted"),
}
SUMMARY_KEYS = {
    *("type", "text", "tokens", "escalated", "escalation_rate", "agreement", "fallbacks"),
    *("finish_reason", "ttft_s", "itl_p50_s", "itl_p95_s", "stall_s", "tokens_per_s"),
    *("requests", "withheld", "cost_estimate", "large_completion_tokens"),
    *("uploaded_tokens", "uploaded_bytes", "mode", "threshold", "small", "large"),
    *("router", "budget"),
}


def test_a_server_killed_in_mid_answer_costs_no_token_and_less_than_a_timeout(
    smollm2: SmallModel,
    host: LocalServer,
    monkeypatch: pytest.MonkeyPatch,
    short_retry_pauses: None,
) -> None:
    # On a slow machine, too, the circuit breaker stays open until the answer ends.
    monkeypatch.setattr(circuit_breaker, "_FIRST_PAUSE_S", 300.0)
    with LargeModel(host.url, timeout_s=60) as large:
        answer = generate(
            smollm2,
            large,
            "Tell me a long story about a fox.",
            router=EntropyRouter(-math.inf),
            max_tokens=10,
            timeout_s=60,
            mode=Mode.WAIT,
        )
        sources, killed_at = [], math.inf
        for token in answer:
            sources.append(token.source)
            if token.index == 3:
                os.kill(host.pid, signal.SIGKILL)
                killed_at = time.monotonic()
        extra_s = answer.stats().stall_s
    stats = answer.stats()
    assert sources == [Source.LARGE] * 4 + [Source.SMALL] * 6
    assert (stats.tokens, stats.fallbacks, stats.unchecked) == (10, 3, 6)
    assert stats.finish_reason is StopReason.LENGTH
    assert time.monotonic() - killed_at < 60 + 30
    assert extra_s < 120


def test_the_second_turn_of_a_long_chat_prefills_only_the_new_messages(smollm2: SmallModel) -> None:
    history = [{"role": "user", "content": "Remember these words: " + "apple pear plum " * 150}]
    first = generate(smollm2, None, history, router=EntropyRouter(math.inf), max_tokens=8)
    text = "".join(token.text for token in first)
    assert first.stats().prompt_tokens > 400
    history += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Which word came first?"},
    ]
    second = generate(smollm2, None, history, router=EntropyRouter(math.inf), max_tokens=4)
    list(second)
    stats = second.stats()
    assert stats.cached_prompt_tokens >= first.stats().prompt_tokens
    assert stats.prompt_tokens - stats.cached_prompt_tokens < 40


@pytest.mark.parametrize(
    "prompt",
    [
        "Repeat exactly: 👩‍💻 漢字 e\u0301te\u0301 🇯🇵",
        pytest.param("Reply with five different emoji.", marks=pytest.mark.heavy),
        pytest.param("Write hello world in Python with a tab.", marks=pytest.mark.heavy),
    ],
)
def test_json_lines_follow_the_schema_and_hold_whole_characters(
    smollm2_path: Path, host: LocalServer, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    code = main(
        [
            *("ask", "--json", "--small", str(smollm2_path), "--large", host.url),
            *("--threshold", "2", "--max-tokens", "12", prompt),
        ]
    )
    assert code == 0
    *tokens, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(token) == TOKEN_KEYS and token["type"] == "token" for token in tokens)
    assert set(summary) >= SUMMARY_KEYS
    assert "".join(token["text"] for token in tokens) == summary["text"]
    assert "\ufffd" not in summary["text"]
    assert [token["index"] for token in tokens] == list(range(summary["tokens"]))
    assert sum(token["escalated"] for token in tokens) == summary["escalated"] > 0
    for token in tokens:
        assert token["escalated"] == (token["entropy_nats"] > 2)
        assert (token["source"] == "large") == token["escalated"]
        assert (token["large"] is not None) == token["escalated"]
