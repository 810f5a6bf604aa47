"""Answers of real models: chats of several turns, and JSON output through a real server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from mlxroute import EntropyRouter, generate
from mlxroute.cli import main
from mlxroute.small import SmallModel
from tests.real.servers import Kind, RunningServer, run_server

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real server with SmolLM2-135M; llama.cpp's costs the least."""
    kind = Kind.MLX_LM if find_spec("xllamacpp") is None else Kind.LLAMA_SERVER
    log_path = tmp_path_factory.mktemp("server") / "log"
    with run_server(kind, "smollm2-135m", log_path=log_path) as running:
        yield running


def test_the_second_turn_of_a_long_chat_prefills_only_the_new_messages(smollm2: SmallModel) -> None:
    history = [{"role": "user", "content": "Remember these words: " + "apple pear plum " * 20}]
    first = generate(smollm2, None, history, router=EntropyRouter(math.inf), max_tokens=2)
    text = "".join(token.text for token in first)
    assert first.stats().prompt_tokens > 60
    history += [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Which word came first?"},
    ]
    second = generate(smollm2, None, history, router=EntropyRouter(math.inf), max_tokens=1)
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
    smollm2: SmallModel,
    server: RunningServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
) -> None:
    # The command uses the model that is in memory.
    monkeypatch.setattr(SmallModel, "load", lambda *_, **__: smollm2)
    code = main(
        [
            *("ask", "--json", "--small", "smollm2-135m", "--large", server.url),
            *("--threshold", "2", "--max-tokens", "6", prompt),
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
