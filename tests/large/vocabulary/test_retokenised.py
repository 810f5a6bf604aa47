"""Tokens that a server would read as others stay for it to write again, in real vocabularies."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlxroute.large.vocabulary.retokenised import stable_context, stable_prefix
from mlxroute.types import LargeContext, Span, Vocabulary
from tests.support import real_vocabularies
from tests.support.real_vocabularies import ANY_TEXT
from tests.support.worlds import token_of

VOCABULARIES = {"smollm2": real_vocabularies.smollm2, "qwen": real_vocabularies.qwen}
# Written one by one these join to other tokens: spaces, line ends, words and their parts.
PARTS = st.lists(
    st.sampled_from([" ", "\n", " \n", "\n\n", "\t", "a", "the", " the", "re", "2", ".", "é", "🦊"])
    | ANY_TEXT.filter(bool),
    min_size=1,
    max_size=12,
)


def written(vocabulary: Vocabulary, lead: str, parts: list[str]) -> LargeContext:
    """The large model's answer `parts`, each cut into tokens by itself."""
    spans: list[Span] = []
    ids: list[int] = []
    for part in parts:
        own = vocabulary.encode(part)
        ids += own
        spans += [Span("", (token_id,)) for token_id in own[:-1]] + [Span(part, (own[-1],))]
    return LargeContext(
        text=lead + "".join(parts),
        token_ids=(*vocabulary.encode(lead), *ids),
        fragment_ids=(),
        vocabulary=vocabulary,
        spans=tuple(spans),
    )


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(lead=ANY_TEXT, parts=PARTS)
def test_what_is_sent_reads_as_it_was_written_and_the_rest_is_to_be_repeated(
    name: str, lead: str, parts: list[str]
) -> None:
    vocabulary = VOCABULARIES[name]()
    context = written(vocabulary, lead, parts)
    own = tuple(token_id for span in context.spans for token_id in span.large_ids)
    assume(len(own) <= 64)
    told = stable_context(context)
    rest = told.fragment_ids
    kept = own[: len(own) - len(rest)]
    assert own == (*kept, *rest)
    assert told.text.encode() + b"".join(map(vocabulary.token_bytes, rest)) == context.text.encode()
    assert told.spans == context.spans[: len(kept)]
    assert vocabulary.encode(told.text)[-len(kept) :] == kept or not kept
    if vocabulary.encode(context.text)[-len(own) :] == own:
        assert told is context


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(lead=ANY_TEXT, parts=PARTS)
def test_tokens_ahead_are_taken_as_far_as_their_texts_read_as_they_were_written(
    name: str, lead: str, parts: list[str]
) -> None:
    vocabulary = VOCABULARIES[name]()
    context = LargeContext(lead, vocabulary.encode(lead), (), vocabulary, ())
    ids = [token_id for part in parts for token_id in vocabulary.encode(part)]
    tokens = [token_of((token_id,)) for token_id in ids]
    found = stable_prefix(context, tokens)
    assert list(found) == tokens[: len(found)]

    def reads(count: int) -> bool:
        data = b"".join(map(vocabulary.token_bytes, ids[:count]))
        try:
            return vocabulary.encode(lead + data.decode()) == (*context.token_ids, *ids[:count])
        except UnicodeDecodeError:
            return False

    assert all(reads(count) for count in range(1, len(found)))
    # A cut far back in the lead itself may be another, and is not looked at.
    if len(found) < len(tokens) and len(lead) <= 64:
        assert not reads(len(found))


def test_tokens_of_the_small_model_are_not_for_the_large_one_to_write() -> None:
    vocabulary = real_vocabularies.smollm2()
    context = written(vocabulary, "Hi", [" ", "there"])
    assert stable_context(context).text == "Hi"
    mixed = LargeContext(
        text=context.text,
        token_ids=context.token_ids,
        fragment_ids=(),
        vocabulary=vocabulary,
        spans=(Span(" there"),),
    )
    assert stable_context(mixed) is mixed


def test_too_many_tokens_to_write_again_are_left_as_they_are() -> None:
    vocabulary = real_vocabularies.smollm2()
    assert stable_context(written(vocabulary, "Hi", [" ", "there", *[" the"] * 62])).text == "Hi"
    long = written(vocabulary, "Hi", [" ", "there", *[" the"] * 63])
    assert stable_context(long) is long
