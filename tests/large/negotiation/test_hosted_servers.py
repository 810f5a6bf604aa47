"""Hosted providers with scripted replies: the dialect that the probe chooses, and its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from mlxroute.errors import LargeRefused
from mlxroute.large import LargeModel
from mlxroute.large.http import retry
from mlxroute.large.negotiation.prober import NoUsableDialect
from mlxroute.types import Message, Span
from tests.support.family_servers import VOCABULARY, continuation
from tests.support.hosted_servers import PROVIDERS, HostedServer, Json, Write
from tests.support.loopback import Loopback, Reply
from tests.support.vocabularies import TableTokenizer, context

MAX_REQUESTS = 60
ASK: Final[Message] = {"role": "user", "content": "Count."}
POSITION: Final = context("1, 2, 3,", VOCABULARY, messages=(ASK,), spans=(Span("1, 2, 3,"),))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)


def write_continuing(messages: Sequence[Json], count: int) -> tuple[list[bytes], bool]:
    """Continue a begun answer, as `prefix` and trailing turns ask for; else begin a new one."""
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    turns = messages[:-1] if begun else messages
    rest = continuation(TableTokenizer(VOCABULARY).render(turns) + begun)
    ids = VOCABULARY.encode(" the" if rest is None else rest)
    return [VOCABULARY.token_bytes(i) for i in ids][:count], len(ids) < count


def write_by_prefix(messages: Sequence[Json], count: int) -> tuple[list[bytes], bool]:
    """Continue a begun answer only if its turn has the mark `prefix`."""
    if messages[-1].get("prefix") or messages[-1]["role"] == "user":
        return write_continuing(messages, count)
    return [b"Sure", b"!"][:count], count > 2


def write_repeating(messages: Sequence[Json], count: int) -> tuple[list[bytes], bool]:
    """Continue a begun answer and repeat its beginning, which costs no tokens."""
    tokens, ends = write_by_prefix(messages, count)
    begun = messages[-1]["content"] if messages[-1].get("prefix") else ""
    return [begun.encode(), *tokens], ends


CONTINUING: Final[dict[str, tuple[Write, str]]] = {
    "Anthropic Claude 4.5": (write_continuing, "chat continuation (trailing turn, text only)"),
    "DeepSeek": (write_by_prefix, "chat continuation (prefix) with thinking disabled"),
    "Mistral": (
        write_repeating,
        "chat continuation (prefix, echoing, text only) with effort none",
    ),
}


@pytest.mark.parametrize("name", CONTINUING)
def test_a_provider_that_continues_answers_is_asked_to(name: str, tmp_path: Path) -> None:
    write, dialect = CONTINUING[name]
    verdicts = tmp_path / "verdicts.json"
    with Loopback(HostedServer(PROVIDERS[name], write)) as server:
        with LargeModel(server.url, verdicts=verdicts) as large:
            verdict = large.probe()
            token = large.next_token(POSITION)
        assert verdict.dialect == dialect
        assert verdict.requests <= MAX_REQUESTS
        assert token.text
        count = len(server.requests)
        with LargeModel(server.url, verdicts=verdicts) as again:
            # The fields are remembered with the verdict.
            assert f"({dialect})" in again.connect()
        assert len(server.requests) - count <= 4


@pytest.mark.parametrize("name", ["xAI Grok 4"])
def test_a_model_whose_thoughts_cost_too_much_is_refused_in_one_line(name: str) -> None:
    with Loopback(HostedServer(PROVIDERS[name], write_continuing)) as server:
        with LargeModel(server.url) as large, pytest.raises(NoUsableDialect) as caught:
            large.probe()
        text = str(caught.value)
        assert text.startswith("the model thinks before it answers: a token costs more than 64")
        assert "\n" not in text
        assert len(server.requests) <= MAX_REQUESTS
        # What the thoughts of the probe cost is counted, though none of them was a token.
        assert large.uploads.completion_tokens >= 64
        assert large.uploads.cached_tokens > 0


def test_a_refused_temperature_leaves_no_dialect_that_promises_greedy_tokens() -> None:
    with (
        Loopback(HostedServer(PROVIDERS["Anthropic Claude 5"], write_continuing)) as server,
        LargeModel(server.url) as large,
        pytest.raises(NoUsableDialect) as caught,
    ):
        large.probe()
    reasons = {item.dialect: item.reason for item in caught.value.rejected}
    assert reasons["chat continuation (prefix)"] == "the server refuses a temperature of 0"


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (429, {"Retry-After": "1800"}, {"error": {"message": "Rate limit reached", "code": "x"}}),
        (
            429,
            {},
            [
                {
                    "error": {
                        "message": "You exceeded your current quota",
                        "details": [{"retryDelay": "1800.5s"}],
                    }
                }
            ],
        ),
    ],
)
def test_a_rate_limit_ends_a_probe_with_the_time_to_wait(
    status: int, headers: dict[str, str], body: object
) -> None:
    limited = replace(Reply.of(body, status=status), headers=headers)
    with Loopback(lambda request: limited) as server, LargeModel(server.url) as large:
        with pytest.raises(LargeRefused, match=r"asks to be called again in 1,80\d s") as caught:
            large.probe()
        assert caught.value.status == 429
        assert len(server.requests) <= 2
