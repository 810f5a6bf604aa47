"""The prompt of a position, and the spans of an answer that it is built from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.engine.transcript import group_spans
from mlxroute.errors import LargeProtocolError, LargeUnsendable, UsageError
from mlxroute.large.dialects import Dialect, RequestOptions, get_dialect
from mlxroute.large.dialects.chat.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.json_fields import parse_object
from mlxroute.large.dialects.tokenize_routes import find_tokenize_routes
from mlxroute.large.vocabulary.prompt_builder import PromptBuilder
from mlxroute.large.vocabulary.token_sources import FileTokenSource, TokenSource
from mlxroute.types import LargeContext, Message, PromptText, Span
from tests.support import family_servers
from tests.support.family_servers import FamilyServer
from tests.support.loopback import Request
from tests.support.vocabularies import BYTE_CHARACTERS, TableTokenizer, TableVocabulary, context

HI: Message = {"role": "user", "content": "hi"}
SMALL = TableVocabulary(["a", "b", "Ġ", "Ã", "©"], bos_text="<s>")
LARGE = family_servers.VOCABULARY
RENDERED = "<s>user\nhi<|im_end|>\n<s>assistant\n"


def dialect(name: str) -> Dialect:
    dialect = get_dialect(name)
    assert dialect is not None
    return dialect


IDS, TEXT = dialect("vLLM completions"), dialect("OpenAI completions")
CHAT, MLX_LM = dialect("chat continuation (flags)"), dialect("mlx_lm completions")


def truthful_routes(
    path: str, body: Mapping[str, object], *, family: str = "vllm"
) -> Mapping[str, object]:
    reply = FamilyServer(family)(Request("POST", path, {}, json.dumps(body).encode()))
    return parse_object(reply.body)


def builder_for(dialect: Dialect, *, same: bool, tokens: TokenSource | None) -> PromptBuilder:
    return PromptBuilder(
        dialect.form,
        same_vocabulary=same,
        tokens=tokens,
        replays_fragments=dialect.crashes_on_cached_prompts,
    )


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


# The prompt in each form


def test_ids_of_a_shared_vocabulary_are_sent_unchanged_fragments_included() -> None:
    half = SMALL.id_of("Ã")
    position_context = answered(Span("aba"), fragment_ids=(half,))
    prompt = builder_for(IDS, same=True, tokens=None).build(position_context)
    assert prompt.ids == (*SMALL.encode("aba"), half)
    assert (prompt.text, prompt.messages) == ("", ())


def test_a_shared_vocabulary_keeps_the_small_template_without_its_begin_token() -> None:
    for tokens in (None, FileTokenSource(TableTokenizer(LARGE))):
        prompt = builder_for(TEXT, same=True, tokens=tokens).build(answered(Span("ab")))
        assert prompt.text == "small template ab"


def test_what_the_large_model_wrote_keeps_its_own_ids() -> None:
    tokens = FileTokenSource(TableTokenizer(LARGE))
    wrote = Span("漢", (3, 4, 5))
    position_context = answered(Span("the "), wrote, Span("pine"), Span("x", (7,)))
    prompt = builder_for(IDS, same=False, tokens=tokens).build(position_context)
    begin = tuple(TableTokenizer(LARGE).encode_prompt(RENDERED))
    assert prompt.ids == (*begin, *LARGE.encode("the "), 3, 4, 5, *LARGE.encode("pine"), 7)


class ThinkingTokenizer(TableTokenizer):
    """The files of a model that always thinks."""

    def render(self, messages: Sequence[Message]) -> str:
        return super().render(messages) + "<think>\n"


def test_thinking_that_the_template_of_files_begins_is_ended() -> None:
    files = FileTokenSource(ThinkingTokenizer(LARGE))
    expected = RENDERED + "<think>\n\n</think>\n\n"
    rendered = files.prompt_text([HI])
    assert rendered is not None
    assert rendered.text == expected
    assert files.prompt_ids([HI]) == tuple(TableTokenizer(LARGE).encode_prompt(expected))


@pytest.mark.parametrize("asked", [IDS, TEXT])
@pytest.mark.parametrize("begun", ["", "Well, "])
def test_the_large_model_continues_the_thinking_of_the_small_one(
    asked: Dialect, begun: str
) -> None:
    """Both templates begin to think; the caller may have begun the answer."""
    small = "<s>small template <think>\n" + begun
    thoughts = answered(Span(begun + "ab"))
    thoughts = replace(thoughts, text=small + "ab", prompt=PromptText(small, small))
    files = FileTokenSource(ThinkingTokenizer(LARGE))
    prompt = builder_for(asked, same=False, tokens=files).build(thoughts)
    if asked is IDS:
        begin = TableTokenizer(LARGE).encode_prompt(RENDERED + "<think>\n")
        assert prompt.ids == (*begin, *LARGE.encode(begun + "ab"))
    else:
        assert prompt.text == RENDERED + "<think>\n" + begun + "ab"


def test_a_foreign_text_prompt_is_rendered_in_the_large_models_template() -> None:
    tokens = FileTokenSource(TableTokenizer(LARGE))
    prompt = builder_for(TEXT, same=False, tokens=tokens).build(answered(Span("ab"), Span("c")))
    assert prompt.text == RENDERED + "abc"
    begins = TableTokenizer(TableVocabulary(["a"], bos_text="<s>"))
    prompt = builder_for(TEXT, same=False, tokens=FileTokenSource(begins)).build(
        answered(Span("ab"))
    )
    assert prompt.text == (RENDERED + "ab").removeprefix("<s>")


def test_without_the_large_models_template_the_small_models_text_is_sent() -> None:
    ids_only = find_tokenize_routes(truthful_routes, model=None)
    for tokens in (None, ids_only):
        prompt = builder_for(TEXT, same=False, tokens=tokens).build(answered(Span("ab")))
        assert prompt.text == "small template ab"


def test_a_chat_prompt_has_the_messages_and_the_answer_start() -> None:
    for same in (True, False):
        prompt = builder_for(CHAT, same=same, tokens=None).build(answered(Span("a"), Span("b")))
        assert (prompt.messages, prompt.answer_start) == ((HI,), "ab")


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
def test_a_fragment_is_sent_only_in_forms_that_carry_it(
    asked: Dialect, same: bool, carried: bool
) -> None:
    builder = builder_for(asked, same=same, tokens=FileTokenSource(TableTokenizer(LARGE)))
    position_context = answered(Span("ab"), fragment_ids=(SMALL.id_of("Ã"),))
    assert builder.carries_fragments is carried
    if carried:
        builder.build(position_context)
    else:
        with pytest.raises(LargeProtocolError, match="inside a character"):
            builder.build(position_context)


def raw(*spans: Span) -> LargeContext:
    """A position after a prompt without messages, as text completions have."""
    prompt = "<s>the<|im_end|>pine"
    text = prompt + "".join(span.text for span in spans)
    return LargeContext(text, (), (), SMALL, spans=spans, prompt=PromptText(prompt, prompt))


@pytest.mark.parametrize("bos_text", ["", "<s>"])
def test_a_raw_prompt_gets_the_large_models_ids_and_begin_token(bos_text: str) -> None:
    large = TableVocabulary([*BYTE_CHARACTERS, "pine"], bos_text=bos_text)
    builder = builder_for(IDS, same=False, tokens=FileTokenSource(TableTokenizer(large)))
    prompt = builder.build(raw(Span("ab"), Span("x", (7,))))
    begin = (0,) if bos_text else ()
    assert prompt.ids == (*begin, *large.encode("the"), 1, *large.encode("pineab"), 7)


def test_a_raw_prompt_is_encoded_by_the_servers_route_with_its_control_tokens() -> None:
    for family in ("vllm", "llama-server"):
        routes = find_tokenize_routes(partial(truthful_routes, family=family), model=None)
        prompt = builder_for(IDS, same=False, tokens=routes).build(raw(Span("ab")))
        assert prompt.ids == (*LARGE.encode("the"), 1, *LARGE.encode("pineab"))
        assert prompt.neutralised == ()


def test_plain_text_in_a_raw_prompt_becomes_no_control_token() -> None:
    text = "<s>the<|im_end|>pine<|im_end|>"
    mark = "\U000f0000"
    rendered = PromptText(text, f"<s>{mark * 3}<|im_end|>{mark * 14}")
    builder = builder_for(IDS, same=False, tokens=FileTokenSource(TableTokenizer(LARGE)))
    prompt = builder.build(LargeContext(text, (), (), SMALL, prompt=rendered))
    assert prompt.ids == (*LARGE.encode("the"), 1, *LARGE.encode("pine< |im_end|>"))
    assert prompt.neutralised == ("<|im_end|>",)


def test_a_raw_prompt_is_not_continued_by_a_server_of_conversations() -> None:
    for same in (True, False):
        with pytest.raises(LargeUnsendable, match="only conversations"):
            builder_for(CHAT, same=same, tokens=None).build(raw(Span("ab")))


def test_a_closed_answer_at_the_end_is_not_sent_to_a_server_that_would_continue_it() -> None:
    messages = (HI, Message(role="assistant", content="ab"))
    closed = replace(answered(), messages=messages)
    routes = find_tokenize_routes(partial(truthful_routes, family="llama-server"), model=None)
    builder = builder_for(IDS, same=False, tokens=routes)
    with pytest.raises(LargeUnsendable, match="ends with an answer"):
        builder.build(closed)
    assert builder.build(replace(closed, messages=(*messages, HI))).neutralised == ()
    chat = builder_for(CHAT, same=True, tokens=None).build(closed)
    for method in (ContinuationMethod.TRAILING, ContinuationMethod.PREFIX):
        with pytest.raises(LargeUnsendable, match="ends with an answer"):
            ChatContinuation(method).request(chat, RequestOptions(1, 5, None))
    # vLLM closes the last turn unless a flag says otherwise.
    flagged = ChatContinuation(ContinuationMethod.FLAGS).request(chat, RequestOptions(1, 5, None))
    assert flagged["messages"] == list(messages)
    files = FileTokenSource(TableTokenizer(LARGE))
    for tokens in (find_tokenize_routes(truthful_routes, model=None), files):
        assert builder_for(IDS, same=False, tokens=tokens).build(closed).ids


def test_tokens_that_no_server_could_generate_again_stay_in_the_text() -> None:
    merging = TableVocabulary(["a", "b", "ab"])
    a, b = merging.id_of("a"), merging.id_of("b")
    written = (Span("a", (a,)), Span("b", (b,)))
    asked = context("ab", merging, answer=(a, b), spans=written)
    # Both tokens become one in the text, so mlx_lm's server has to generate them again.
    assert builder_for(MLX_LM, same=True, tokens=None).stable_context(asked).fragment_ids == (a, b)
    builder = builder_for(dialect("TGI generate"), same=True, tokens=None)
    assert builder.build(builder.stable_context(asked)).text == "ab"


def test_an_id_prompt_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(LargeProtocolError, match="no tokenizer of the large model"):
        builder_for(IDS, same=False, tokens=None).build(answered())


def test_a_template_that_rejects_the_conversation_is_a_large_error() -> None:
    class Rejects(TableTokenizer):
        def render(self, messages: Sequence[Message]) -> str:
            raise UsageError("the chat template of m fails: no system turn")

    for asked in (IDS, TEXT):
        builder = builder_for(asked, same=False, tokens=FileTokenSource(Rejects(LARGE)))
        with pytest.raises(LargeProtocolError, match="no system turn"):
            builder.build(answered())


# Control tokens in messages

BAD: Message = {"role": "user", "content": "a<|im_end|>b <|eot_id|> [TODO]"}


def asked(*spans: Span) -> LargeContext:
    small = TableTokenizer(SMALL)
    encoded = small.encode_conversation([BAD])
    text = encoded.text + "".join(span.text for span in spans)
    return LargeContext(
        text, encoded.ids, (), SMALL, messages=(BAD,), spans=spans, prompt=encoded.rendered
    )


def test_a_text_prompt_keeps_only_the_templates_control_tokens() -> None:
    prompt = builder_for(TEXT, same=True, tokens=None).build(asked(Span("x<|im_end|>")))
    assert prompt.text == (
        "user\na< |im_end|>b <|eot_id|> [TODO]<|im_end|>\n<s>assistant\nx< |im_end|>"
    )
    assert prompt.neutralised == ("<|im_end|>",)


def test_a_text_prompt_may_end_before_the_end_of_the_template() -> None:
    position_context = asked()
    text = position_context.text.removesuffix("\n")
    shorter = replace(position_context, text=text, fragment_ids=(2,))
    prompt = builder_for(MLX_LM, same=True, tokens=None).build(shorter)
    assert prompt.text == "user\na< |im_end|>b <|eot_id|> [TODO]<|im_end|>\n<s>assistant"


def test_a_foreign_text_prompt_keeps_only_the_large_templates_control_tokens() -> None:
    tokens = FileTokenSource(TableTokenizer(LARGE))
    prompt = builder_for(TEXT, same=False, tokens=tokens).build(asked())
    assert prompt.text == (
        "<s>user\na< |im_end|>b <|eot_id|> [TODO]<|im_end|>\n<s>assistant\n"
    ).removeprefix(LARGE.bos_text)


def test_for_an_unknown_vocabulary_control_tokens_are_known_by_their_form() -> None:
    prompt = builder_for(TEXT, same=False, tokens=None).build(asked())
    assert prompt.text == "user\na< |im_end|>b < |eot_id|> [TODO]<|im_end|>\n<s>assistant\n"
    assert prompt.neutralised == ("<|im_end|>", "<|eot_id|>")


def test_a_chat_prompt_has_no_control_tokens() -> None:
    prompt = builder_for(CHAT, same=False, tokens=None).build(asked(Span("x</s><think>y")))
    assert prompt.messages == ({"role": "user", "content": "a< |im_end|>b < |eot_id|> [TODO]"},)
    assert prompt.answer_start == "x< /s><think>y"
    prompt = builder_for(CHAT, same=True, tokens=None).build(asked())
    assert prompt.messages[0]["content"] == "a< |im_end|>b <|eot_id|> [TODO]"
    assert prompt.neutralised == ("<|im_end|>",)


def test_an_id_prompt_by_a_route_that_reads_control_tokens_has_none_in_contents() -> None:
    sent: list[object] = []

    def routes(path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        sent.append(body.get("messages", body.get("prompt")))
        return truthful_routes(path, body)

    tokens = find_tokenize_routes(routes, model=None)
    sent.clear()
    prompt = builder_for(IDS, same=False, tokens=tokens).build(asked(Span("x</s>")))
    assert prompt.neutralised == ("<|im_end|>", "<|eot_id|>")
    assert "<|im_end|>" not in str(sent)
    assert "</s>" not in str(sent)
    assert prompt.ids.count(1) == 1


# Spans


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
    assert group_spans((*token, False) for token in written) == (
        Span("ab"),
        Span(" the", (9,)),
        Span("", (8,)),
        Span("c"),
        Span("é", (7,)),
        Span("d"),
    )


def test_a_large_token_without_ids_is_not_joined_to_one_with_ids() -> None:
    written: list[tuple[str, tuple[int, ...] | None]] = [("x", (7,)), ("", ()), ("é", None)]
    spans = group_spans((*token, False) for token in written)
    assert spans == (Span("x", (7,)), Span("é"))


def test_the_spans_before_a_reply_are_those_after_it() -> None:
    def spans(large_ids: tuple[int, ...]) -> list[str]:
        written = [("a", (), False), (" walk", large_ids, True), ("ing", (), False)]
        return [span.text for span in group_spans(written)]

    assert spans(()) == spans((7,)) == ["a", " walk", "ing"]


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
    joined = group_spans(
        (text, None if position else tuple(large_ids), False)
        for texts, large_ids in tokens
        for position, text in enumerate(texts)
    )
    assert "".join(span.text for span in joined) == "".join("".join(texts) for texts, _ in tokens)
    ids = [i for span in joined for i in span.large_ids]
    assert ids == [i for _, large_ids in tokens for i in large_ids]
    named = [("".join(texts), tuple(ids)) for texts, ids in tokens if ids]
    assert [(span.text, span.large_ids) for span in joined if span.large_ids] == named
