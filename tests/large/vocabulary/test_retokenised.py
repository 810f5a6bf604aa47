"""Tokens that a server would cut differently are left for it to generate, in real vocabularies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlxroute.large.vocabulary.retokenised import stable_context, stable_prefix
from mlxroute.types import LargeContext, Span, Vocabulary
from tests.support import real_vocabularies
from tests.support.real_vocabularies import ANY_TEXT
from tests.support.worlds import token_of

VOCABULARIES = {"smollm2": real_vocabularies.smollm2, "qwen": real_vocabularies.qwen}
# Encoded together these merge into other tokens: spaces, line ends, words and their parts.
PARTS = st.lists(
    st.sampled_from([" ", "\n", " \n", "\n\n", "\t", "a", "the", " the", "re", "2", ".", "é", "🦊"])
    | ANY_TEXT.filter(bool),
    min_size=1,
    max_size=12,
)


def written(vocabulary: Vocabulary, lead: str, parts: list[str]) -> LargeContext:
    """Return the context after the large model's answer `parts`, each encoded by itself."""
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
def test_the_text_that_is_sent_is_cut_as_it_was_written_and_the_rest_is_repeated(
    name: str, lead: str, parts: list[str]
) -> None:
    vocabulary = VOCABULARIES[name]()
    context = written(vocabulary, lead, parts)
    own = tuple(token_id for span in context.spans for token_id in span.large_ids)
    assume(len(own) <= 64)
    stable = stable_context(context)
    rest = stable.fragment_ids
    kept = own[: len(own) - len(rest)]
    assert own == (*kept, *rest)
    assert (
        stable.text.encode() + b"".join(map(vocabulary.token_bytes, rest)) == context.text.encode()
    )
    assert stable.spans == context.spans[: len(kept)]
    assert vocabulary.encode(stable.text)[-len(kept) :] == kept or not kept
    if vocabulary.encode(context.text)[-len(own) :] == own:
        assert stable is context


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(lead=ANY_TEXT, parts=PARTS)
@example(lead="::\U0001d1bb", parts=[" ", " "])
def test_prefetched_tokens_are_kept_while_their_text_is_cut_as_it_was_written(
    name: str, lead: str, parts: list[str]
) -> None:
    vocabulary = VOCABULARIES[name]()
    context = LargeContext(lead, vocabulary.encode(lead), (), vocabulary, ())
    ids = [token_id for part in parts for token_id in vocabulary.encode(part)]
    tokens = [token_of((token_id,)) for token_id in ids]
    prefix = stable_prefix(context, tokens)
    assert list(prefix) == tokens[: len(prefix)]

    def is_stable(count: int) -> bool:
        data = b"".join(map(vocabulary.token_bytes, ids[:count]))
        try:
            return vocabulary.encode(lead + data.decode()) == (*context.token_ids, *ids[:count])
        except UnicodeDecodeError:
            return False

    assert all(is_stable(count) for count in range(1, len(prefix)))
    # A different cut far back in the lead is not checked.
    if len(prefix) < len(tokens) and len(lead) <= 64:
        assert not is_stable(len(prefix))


def test_tokens_before_a_begun_character_move_too() -> None:
    vocabulary = real_vocabularies.smollm2()
    whole = written(vocabulary, "Hi", [" ", "there"])
    begun = vocabulary.encode("🙂")[0]
    context = replace(whole, token_ids=(*whole.token_ids, begun), fragment_ids=(begun,))
    stable, expected = stable_context(context), stable_context(whole)
    assert expected.fragment_ids
    assert (stable.text, stable.spans) == (expected.text, expected.spans)
    assert stable.fragment_ids == (*expected.fragment_ids, begun)


def test_tokens_of_the_small_model_do_not_move() -> None:
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


def test_with_too_many_tokens_to_repeat_the_context_stays_unchanged() -> None:
    vocabulary = real_vocabularies.smollm2()
    assert stable_context(written(vocabulary, "Hi", [" ", "there", *[" the"] * 62])).text == "Hi"
    long = written(vocabulary, "Hi", [" ", "there", *[" the"] * 63])
    assert stable_context(long) is long


def test_an_answer_with_a_broken_character_stays_unchanged() -> None:
    vocabulary = real_vocabularies.smollm2()
    whole = written(vocabulary, "Hi", [" ", "there"])
    broken = vocabulary.encode("🙂")[0]
    # The text lacks the first bytes of a character that the large model did not finish.
    ids, spans = vocabulary.encode("Hi"), (Span("", (broken,)), *whole.spans)
    context = replace(whole, token_ids=(*ids, broken, *whole.token_ids[len(ids) :]), spans=spans)
    assert stable_context(context) is context
