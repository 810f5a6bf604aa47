"""The optional fields of chat requests: what each provider's refusals and replies lead to."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects import LADDER, FieldedDialect, RequestOptions, get_dialect
from mlxroute.large.dialects.chat.chat_reply import ModelThinks, chat_text
from mlxroute.large.dialects.chat.request_fields import (
    MAX_GENERATED_PER_TOKEN,
    FieldSearch,
    RequestFields,
    Thinking,
)
from mlxroute.large.dialects.json_fields import (
    error_message,
    parse_object,
    thought_tokens,
    usage_counts,
)
from tests.support.hosted_servers import FIELDS, PROVIDERS, Json, Provider

ASK = {"role": "user", "content": "Count."}
# The refused and the unread requests of a probe, before the first usable reply.
MAX_REQUESTS = 12


def _write(messages: object, count: int) -> tuple[list[bytes], bool]:
    return [b" a"] * count, False


def _search(provider: Provider) -> tuple[RequestFields | None, int, list[int]]:
    """Return the fields that a provider takes, the requests, and the tokens each generated."""
    search, generated = FieldSearch(), []
    fields: RequestFields | None = search.fields
    for number in range(1, 30):
        assert fields is not None
        body = {"messages": [ASK], **fields.body(RequestOptions(1, 5, "m"), logprobs=True)}
        reply = provider.reply(body, _write)
        if reply.status != 200:
            fields = search.after_refusal(error_message(reply.body))
        else:
            value = parse_object(reply.body)
            generated.append(usage_counts(value)["completion_tokens"] or 0)
            try:
                assert chat_text(value)
            except ModelThinks:
                fields = search.after_thinking()
            else:
                return fields, number, generated
        if fields is None:
            return None, number, generated
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_is_asked_with_the_fields_that_it_takes(name: str) -> None:
    fields, requests, generated = _search(PROVIDERS[name])
    assert (None if fields is None else fields.describe()) == FIELDS[name]
    assert requests <= MAX_REQUESTS
    # A search costs no more per request than a token may cost afterwards.
    assert max(generated, default=0) <= MAX_GENERATED_PER_TOKEN


FIELD_VALUES = st.builds(
    RequestFields,
    limit_name=st.sampled_from(["max_tokens", "max_completion_tokens"]),
    temperature=st.booleans(),
    logprobs=st.booleans(),
    thinking=st.sampled_from(Thinking),
    least_tokens=st.sampled_from([1, 16, 64]),
)


@given(FIELD_VALUES)
def test_the_description_of_fields_is_read_back(fields: RequestFields) -> None:
    assert RequestFields.parse(fields.describe()) == fields


@given(FIELD_VALUES)
def test_a_dialect_is_known_by_its_name_with_the_fields(fields: RequestFields) -> None:
    for dialect in LADDER:
        if isinstance(dialect, FieldedDialect) and not dialect.lacks(fields):
            changed = dialect.with_fields(fields)
            known = get_dialect(changed.name)
            assert isinstance(known, FieldedDialect)
            assert (known.name, known.fields) == (changed.name, changed.fields)
            assert known.rung == dialect.rung


@pytest.mark.parametrize(
    "description",
    ["effort", "effort none, max_completion_tokens", "no temperature, no temperature", ", ", "x"],
)
def test_a_description_that_was_not_written_is_refused(description: str) -> None:
    assert RequestFields.parse(description) is None
    assert get_dialect(f"chat continuation (prefix) with {description}") is None


@given(
    st.lists(st.text() | st.sampled_from(["temperature", "max_tokens >= 9", "reasoning_effort"]))
)
def test_any_texts_of_refusals_end_the_search(texts: list[str]) -> None:
    search = FieldSearch()
    for number in range(60):
        text = " ".join(texts) if number % 2 else "logprobs or temperature, and thinking"
        if search.after_refusal(text) is None:
            break
    else:
        raise AssertionError("the search does not end")


def test_a_refusal_that_repeats_the_request_shows_nothing_about_its_fields() -> None:
    search = FieldSearch()
    body = {"messages": [ASK], **search.fields.body(RequestOptions(1, 5, "m"), logprobs=True)}
    assert search.after_refusal(f"cannot handle {body}") is None
    assert search.fields == RequestFields()


def test_a_model_that_keeps_thinking_ends_the_search() -> None:
    search, ways = FieldSearch(), []
    while (fields := search.after_thinking()) is not None:
        ways.append((fields.thinking, fields.least_tokens))
    assert [way for way, _ in ways[:-1]] == [way for way in Thinking if way is not Thinking.UNSET]
    assert ways[-1] == (Thinking.MINIMAL, MAX_GENERATED_PER_TOKEN)


# Replies


def _reply(message: Json, **usage: object) -> Json:
    return {"choices": [{"message": message, "finish_reason": "length"}], "usage": usage}


@pytest.mark.parametrize(
    "reply",
    [
        _reply({"content": "", "reasoning_content": "Let me see"}),
        _reply({"content": None, "reasoning": "Let me see"}),
        _reply({"content": "<think>\nLet me"}),
        _reply({"content": [{"type": "thinking", "thinking": []}]}),
        _reply({"content": ""}, completion_tokens_details={"reasoning_tokens": 16}),
        _reply({"content": ""}, prompt_tokens=20, completion_tokens=0, total_tokens=80),
        _reply({"content": ""}, completion_tokens=16),
    ],
)
def test_a_reply_of_thoughts_is_recognised(reply: Json) -> None:
    with pytest.raises(ModelThinks):
        chat_text(reply)


def test_thoughts_beside_an_answer_are_left_out_of_its_text() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]
    parts.append({"type": "text", "text": " fig"})
    assert chat_text(_reply({"content": parts})) == " fig"
    assert chat_text(_reply({"content": " fig", "reasoning": "Hm"})) == " fig"
    # The first token may be a part of a character, which has no text.
    assert chat_text(_reply({"content": ""}, completion_tokens=1)) == ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "message", "content", "type", "text", "usage", "total_tokens"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )
)
def test_any_reply_gives_a_text_or_an_error(value: object) -> None:
    reply = {"choices": [{"message": value}], "usage": value}
    with contextlib.suppress(LargeProtocolError):
        assert isinstance(chat_text(reply), str)


@pytest.mark.parametrize(
    ("usage", "completion", "thoughts"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}, 5, 0),
        # The total alone counts the thoughts.
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 54}, 45, 40),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 5,
                "total_tokens": 54,
                "completion_tokens_details": {"reasoning_tokens": 40},
            },
            45,
            40,
        ),
        ({"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 4}}, 5, 4),
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 3}, 5, 0),
        ({"completion_tokens_details": {"reasoning_tokens": -1}, "total_tokens": "9"}, None, 0),
    ],
)
def test_generated_tokens_include_thoughts(
    usage: Json, completion: int | None, thoughts: int
) -> None:
    reply = {"usage": usage}
    assert usage_counts(reply)["completion_tokens"] == completion
    assert thought_tokens(reply) == thoughts


@pytest.mark.parametrize(
    "details",
    [
        {"prompt_tokens_details": {"cached_tokens": 7}},
        {"prompt_cache_hit_tokens": 7},
        {"num_cached_tokens": 7},
        {"prompt_tokens_details": {"cached_tokens": None}, "num_cached_tokens": 7},
    ],
)
def test_cached_prompt_tokens_are_read_under_each_name(details: Json) -> None:
    assert usage_counts({"usage": {"prompt_tokens": 9, **details}})["cached_tokens"] == 7
