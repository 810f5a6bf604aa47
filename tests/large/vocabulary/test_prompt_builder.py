"""The prompt of a position in the large model's own words, and whether the vocabularies agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.engine.text import spans
from mlxroute.errors import LargeProtocolError, LargeRefused, UsageError
from mlxroute.large.dialects import Dialect, dialect_named
from mlxroute.large.http.transport import Reply
from mlxroute.large.vocabulary.prompt_builder import PromptBuilder
from mlxroute.large.vocabulary.same_vocabulary import (
    fingerprint,
    same_decoded,
    same_entries,
    same_named,
)
from mlxroute.large.vocabulary.tokenizers import FileTokens, ServerTokens
from mlxroute.types import LargeContext, Message, Span
from tests.support import truthful
from tests.support.loopback import Request
from tests.support.truthful import Truthful
from tests.support.vocabularies import TableTokenizer, TableVocabulary, context

HI: Message = {"role": "user", "content": "hi"}
SMALL = TableVocabulary(["a", "b", "Ġ", "Ã", "©"], bos_text="<s>")
LARGE = truthful.VOCABULARY
RENDERED = "<s>user\nhi<|im_end|>\n<s>assistant\n"


def dialect(name: str) -> Dialect:
    found = dialect_named(name)
    assert found is not None
    return found


IDS, TEXT = dialect("vLLM completions"), dialect("OpenAI completions")
CHAT, MLX_LM = dialect("chat continuation (flags)"), dialect("mlx_lm completions")


@dataclass
class Routes:
    """The tokenise routes of a truthful server, without a server."""

    answer: Any
    asked: list[str] = field(default_factory=list)

    def __call__(self, path: str, body: Mapping[str, object]) -> Reply:
        self.asked.append(path)
        reply = self.answer(Request("POST", path, {}, json.dumps(body).encode()))
        return Reply(reply.status, reply.body)


def answered(*spans: Span, fragment_ids: tuple[int, ...] = ()) -> LargeContext:
    text = "".join(span.text for span in spans)
    return context(
        "<s>small template " + text,
        SMALL,
        answer=SMALL.encode("aba"),
        fragment_ids=fragment_ids,
        messages=(HI,),
        spans=spans,
    )


# What the builder sends


def test_a_shared_vocabularys_ids_go_out_as_they_are_fragments_too() -> None:
    half = SMALL.id_of("Ã")
    wanted = answered(Span("aba"), fragment_ids=(half,))
    prompt = PromptBuilder(IDS, same=True, tokens=None).build(wanted)
    assert prompt.ids == (*SMALL.encode("aba"), half)
    assert (prompt.text, prompt.messages) == ("", ())


def test_a_shared_vocabulary_keeps_the_small_template_without_its_begin_token() -> None:
    for tokens in (None, FileTokens(TableTokenizer(LARGE))):
        prompt = PromptBuilder(TEXT, same=True, tokens=tokens).build(answered(Span("ab")))
        assert prompt.text == "small template ab"


def test_what_the_large_model_wrote_keeps_its_own_ids() -> None:
    tokens = FileTokens(TableTokenizer(LARGE))
    wrote = Span("漢", (3, 4, 5))
    wanted = answered(Span("the "), wrote, Span("pine"), Span("x", (7,)))
    prompt = PromptBuilder(IDS, same=False, tokens=tokens).build(wanted)
    begin = tuple(TableTokenizer(LARGE).encode_prompt(RENDERED))
    assert prompt.ids == (*begin, *LARGE.encode("the "), 3, 4, 5, *LARGE.encode("pine"), 7)


def test_a_foreign_text_prompt_is_rendered_in_the_large_models_template() -> None:
    tokens = FileTokens(TableTokenizer(LARGE))
    prompt = PromptBuilder(TEXT, same=False, tokens=tokens).build(answered(Span("ab"), Span("c")))
    assert prompt.text == RENDERED + "abc"
    begins = TableTokenizer(TableVocabulary(["a"], bos_text="<s>"))
    prompt = PromptBuilder(TEXT, same=False, tokens=FileTokens(begins)).build(answered(Span("ab")))
    assert prompt.text == (RENDERED + "ab").removeprefix("<s>")


def test_without_the_large_models_template_the_small_one_must_do() -> None:
    server = ServerTokens.find(Routes(Truthful("vllm")), model=None)
    for tokens in (None, server):
        prompt = PromptBuilder(TEXT, same=False, tokens=tokens).build(answered(Span("ab")))
        assert prompt.text == "small template ab"


def test_a_chat_is_given_the_conversation_and_the_begun_turn() -> None:
    for same in (True, False):
        prompt = PromptBuilder(CHAT, same=same, tokens=None).build(answered(Span("a"), Span("b")))
        assert (prompt.messages, prompt.begun) == ((HI,), "ab")


@pytest.mark.parametrize(
    ("asked", "same", "carried"),
    [
        (IDS, True, True),
        (MLX_LM, True, True),
        (IDS, False, False),
        (MLX_LM, False, False),
        (TEXT, True, False),
        (CHAT, True, False),
    ],
)
def test_a_begun_character_goes_out_where_it_can(asked: Dialect, same: bool, carried: bool) -> None:
    builder = PromptBuilder(asked, same=same, tokens=FileTokens(TableTokenizer(LARGE)))
    wanted = answered(Span("ab"), fragment_ids=(SMALL.id_of("Ã"),))
    assert builder.carries_fragments is carried
    if carried:
        builder.build(wanted)
    else:
        with pytest.raises(LargeProtocolError, match="inside a character"):
            builder.build(wanted)


def test_ids_that_nothing_can_make_are_an_error() -> None:
    with pytest.raises(LargeProtocolError, match="nothing here cuts text"):
        PromptBuilder(IDS, same=False, tokens=None).build(answered())


def test_a_template_that_refuses_the_conversation_is_an_error_of_the_large_side() -> None:
    class Refuses(TableTokenizer):
        def render(self, messages: Sequence[Message]) -> str:
            raise UsageError("the chat template of m refuses this conversation: no system turn")

    for asked in (IDS, TEXT):
        builder = PromptBuilder(asked, same=False, tokens=FileTokens(Refuses(LARGE)))
        with pytest.raises(LargeProtocolError, match="no system turn"):
            builder.build(answered())


# Who wrote what


def test_spans_join_what_the_small_model_wrote_and_keep_large_tokens_apart() -> None:
    written: list[tuple[str, tuple[int, ...] | None]] = [
        ("a", ()),
        ("b", ()),
        (" the", (9,)),
        ("", (8,)),
        ("c", ()),
        ("", (7,)),
        ("é", None),
        ("", ()),
        ("d", ()),
    ]
    assert spans(written) == (
        Span("ab"),
        Span(" the", (9,)),
        Span("", (8,)),
        Span("c"),
        Span("é", (7,)),
        Span("d"),
    )


def test_a_large_token_without_ids_is_not_counted_to_one_that_has_them() -> None:
    assert spans([("x", (7,)), ("", ()), ("é", None)]) == (Span("x", (7,)), Span("é"))


TOKENS = st.lists(
    st.tuples(
        st.lists(st.text(max_size=2), min_size=1, max_size=3),
        st.lists(st.integers(0, 9), max_size=2),
    )
)


@given(tokens=TOKENS)
def test_spans_hold_the_whole_text_and_every_large_id_once(
    tokens: list[tuple[list[str], list[int]]],
) -> None:
    found = spans(
        (text, None if position else tuple(large_ids))
        for texts, large_ids in tokens
        for position, text in enumerate(texts)
    )
    assert "".join(span.text for span in found) == "".join("".join(texts) for texts, _ in tokens)
    ids = [i for span in found for i in span.large_ids]
    assert ids == [i for _, large_ids in tokens for i in large_ids]
    named = [("".join(texts), tuple(ids)) for texts, ids in tokens if ids]
    assert [(span.text, span.large_ids) for span in found if span.large_ids] == named


# Whether two models share a vocabulary


def test_padding_and_further_ids_at_the_end_are_ignored() -> None:
    longer = TableVocabulary(["a", "b", "Ġ", "Ã", "©", "more", "<|extra|>"])
    assert same_entries(SMALL, longer)
    assert same_entries(longer, SMALL)


def test_one_token_that_differs_is_noticed() -> None:
    other = TableVocabulary(["a", "b", "Ġ", "Ä", "©"])
    assert not same_entries(SMALL, other)
    assert fingerprint(SMALL) != fingerprint(other)
    assert fingerprint(SMALL) == fingerprint(TableVocabulary(["a", "b", "Ġ", "Ã", "©"]))
    assert fingerprint(TableVocabulary(["a", "bc"])) != fingerprint(TableVocabulary(["ab", "c"]))


def test_names_in_replies_tell_only_when_there_are_enough() -> None:
    pieces = {i: LARGE.piece(i) or "" for i in range(100)}
    assert same_named(LARGE, pieces) is True
    assert same_named(LARGE, {i: pieces[i] for i in range(5)}) is None
    assert same_named(LARGE, pieces | {50: "other"}) is False
    assert same_named(LARGE, pieces | {10**6: "beyond"}) is False


def test_a_detokenise_route_tells_for_whole_characters_in_few_calls() -> None:
    calls: list[Sequence[int]] = []

    def decode(ids: Sequence[int]) -> str:
        calls.append(ids)
        return b"".join(map(LARGE.token_bytes, ids)).decode()

    assert same_decoded(LARGE, decode) is True
    assert len(calls) == 1
    assert same_decoded(LARGE, lambda ids: decode(ids)[1:]) is False
    assert same_decoded(LARGE, lambda ids: decode(ids).replace("pine", "fir")) is False


def test_the_first_space_that_a_sentencepiece_route_drops_is_no_difference() -> None:
    words = TableVocabulary(["Ġthe", "Ġa", "b"])
    assert same_decoded(words, lambda ids: "the ab") is True
    assert same_decoded(words, lambda ids: " the ab") is True
    assert same_decoded(words, lambda ids: "the a b") is False


def test_a_detokenise_route_that_fails_tells_nothing() -> None:
    def fails(ids: Sequence[int]) -> str:
        raise LargeRefused("/detokenize answered 404: Not Found")

    assert same_decoded(LARGE, fails) is None
    assert same_decoded(TableVocabulary([]), lambda ids: "") is None


# The server's own tokenise routes


@pytest.mark.parametrize("family", ["vllm", "sglang", "llama-server"])
def test_the_routes_of_a_truthful_server_are_found_and_asked_once_for_a_text(family: str) -> None:
    routes = Routes(Truthful(family))
    tokens = ServerTokens.find(routes, model="m")
    assert tokens is not None
    asked = len(routes.asked)
    for _ in range(2):
        assert tokens.encode("pineapple") == LARGE.encode("pineapple")
        rendered = TableTokenizer(LARGE).encode_prompt(RENDERED)
        assert tokens.prompt([HI]) == tuple(rendered)
    assert len(routes.asked) == asked + (3 if family == "llama-server" else 2)
    assert tokens.encode("<s>") == LARGE.encode("<s>") or family != "llama-server"
    assert tokens.text([HI]) is None
    assert tokens.bos_text == ""


def test_no_text_has_no_ids_and_no_route_no_tokens() -> None:
    assert ServerTokens.find(Routes(Truthful("legacy")), model=None) is None
    tokens = ServerTokens.find(Routes(Truthful("vllm")), model=None)
    assert tokens is not None
    assert tokens.encode("") == ()


@pytest.mark.parametrize("family", ["vllm", "llama-server"])
def test_a_route_that_lies_about_a_sample_is_not_used(family: str) -> None:
    honest = Truthful(family)

    def other_ids(request: Request) -> Any:
        if request.path == "/tokenize":
            body = request.json
            key = "content" if "content" in body else "prompt"
            body[key] = "another text"
            return honest(Request("POST", "/tokenize", {}, json.dumps(body).encode()))
        return honest(request)

    assert ServerTokens.find(Routes(other_ids), model=None) is None


@pytest.mark.parametrize("tokens", [None, [], ["7"], [-1], [1.5], {"a": 1}, "ids"])
def test_ids_that_are_none_are_a_route_that_is_not_used(tokens: object) -> None:
    def nonsense(path: str, body: Mapping[str, object]) -> Reply:
        return Reply(200, json.dumps({"tokens": tokens, "content": "Hello world"}).encode())

    assert ServerTokens.find(nonsense, model=None) is None


@pytest.mark.parametrize("drops", [True, False])
def test_a_route_that_begins_every_text_with_a_space_gives_ids_without_it(drops: bool) -> None:
    """As SentencePiece tokenizers do; their detokenise routes may take it away again."""
    honest = Truthful("vllm")

    def prefixed(request: Request) -> Any:
        body = request.json
        if "prompt" in body:
            body["prompt"] = " " + body["prompt"]
        reply = honest(Request("POST", request.path, {}, json.dumps(body).encode()))
        if request.path == "/detokenize" and drops:
            text = json.loads(reply.body)["prompt"]
            return type(reply).of({"prompt": text.removeprefix(" ")})
        return reply

    tokens = ServerTokens.find(Routes(prefixed), model=None)
    assert tokens is not None
    for text in ("pineapple", " the", "\n", "day one"):
        assert tokens.encode(text) == LARGE.encode(text)
