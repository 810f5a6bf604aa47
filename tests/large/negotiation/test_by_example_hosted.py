"""Hosted providers whose models only start new answers: asked by example, with their own fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest

from mlxroute.errors import LargeProtocolError
from mlxroute.large import LargeModel
from mlxroute.large.dialects.chat.request_fields import MAX_GENERATED_PER_TOKEN
from mlxroute.large.http import retry
from mlxroute.large.negotiation.prober import NoUsableDialect
from mlxroute.types import Message, Span
from tests.support.example_chat import read_question
from tests.support.family_servers import VOCABULARY
from tests.support.hosted_servers import FIELDS, PROVIDERS, HostedServer, Json
from tests.support.known_answers import write_known
from tests.support.loopback import Loopback
from tests.support.vocabularies import context

MAX_REQUESTS = 70
ASK: Final[Message] = {"role": "user", "content": "Count."}
POSITION: Final = context("1, 2, 3,", VOCABULARY, messages=(ASK,), spans=(Span("1, 2, 3,"),))
# The others continue a begun answer.
BY_EXAMPLE: Final = FIELDS.keys() - {"Anthropic Claude 4.5", "Mistral", "DeepSeek"}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.001)


@pytest.mark.parametrize("name", sorted(name for name in BY_EXAMPLE if FIELDS[name] is not None))
def test_a_provider_is_asked_by_example_with_the_fields_that_it_takes(name: str) -> None:
    with Loopback(HostedServer(PROVIDERS[name], write_known)) as server:
        with LargeModel(server.url) as large:
            verdict = large.probe()
            token = large.next_token(POSITION)
            assert large.is_approximate
        dialect, _, fields = verdict.dialect.partition(" with ")
        assert (dialect, fields, verdict.rung) == ("completion by example", FIELDS[name], 5)
        assert verdict.requests <= MAX_REQUESTS
        assert " 4".startswith(token.text)
        assert _limit(server.requests[-1].json) <= MAX_GENERATED_PER_TOKEN


@pytest.mark.parametrize("name", ["OpenAI GPT-4.1", "Groq Llama"])
def test_logprobs_are_said_to_be_given_where_they_are(name: str) -> None:
    hosted = HostedServer(PROVIDERS[name], write_known)
    with Loopback(hosted) as server, LargeModel(server.url) as large:
        checks = {check.name: check.passed for check in large.probe().checks}
    assert checks["logprobs"] is PROVIDERS[name].logprobs


def _limit(body: Json) -> int:
    return int(body.get("max_tokens") or body["max_completion_tokens"])


@pytest.mark.parametrize("name", sorted(name for name in BY_EXAMPLE if FIELDS[name] is None))
def test_a_model_whose_thoughts_cost_too_much_is_refused_in_one_line(name: str) -> None:
    with Loopback(HostedServer(PROVIDERS[name], write_known)) as server:
        with LargeModel(server.url) as large, pytest.raises(NoUsableDialect) as caught:
            large.probe()
        text = str(caught.value)
        assert text.startswith("the model thinks before it answers: a token costs more than 64")
        assert "\n" not in text
        assert len(server.requests) <= MAX_REQUESTS


def test_a_model_that_goes_on_in_one_place_only_is_not_used_without_a_probe() -> None:
    """One right answer is not enough, as it is for dialects that continue the answer itself."""

    def write(messages: Sequence[Json], count: int) -> tuple[list[bytes], bool]:
        question = read_question(messages)
        is_fruit = question is not None and question[1].startswith("pineapple")
        return write_known(messages, count) if is_fruit else ([b"Sure", b"!"][:count], False)

    for model, error in ((write, LargeProtocolError), (write_known, None)):
        with (
            Loopback(HostedServer(PROVIDERS["OpenAI GPT-4.1"], model)) as server,
            LargeModel(server.url) as large,
        ):
            if error is None:
                assert large.next_token(POSITION).text == " "
                continue
            with pytest.raises(error, match="probe it"):
                large.next_token(POSITION)
