"""The token that a reply names, read into the small vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from mlxroute.errors import LargeNotContinued, LargeProtocolError
from mlxroute.large import LargeModel
from mlxroute.large.dialects import Dialect, get_dialect
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.large.vocabulary.bridge import Bridge, BridgedToken
from mlxroute.large.vocabulary.token_reader import TokenReader
from tests.support.connected_clients import (
    MLX_LM,
    PLAIN,
    THE,
    VOCABULARY,
    ask_mlx,
    ask_plain,
    connected_client,
    content_reply,
    legacy,
)
from tests.support.family_servers import VOCABULARY as FAMILY
from tests.support.family_servers import FamilyServer
from tests.support.loopback import Loopback, Reply, mlx_lm_reply
from tests.support.vocabularies import END_ID, TableTokenizer, TableVocabulary, context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def dialect(name: str) -> Dialect:
    dialect = get_dialect(name)
    assert dialect is not None
    return dialect


def read(
    name: str,
    reply: Reply | dict[str, Any],
    *,
    vocabulary: TableVocabulary = VOCABULARY,
    same: bool = False,
) -> BridgedToken | None:
    """The first token of a reply in the small vocabulary."""
    value = json.loads(reply.body) if isinstance(reply, Reply) else reply
    completion = dialect(name).completion(value, Prompt(text="x"))
    reader = TokenReader()
    reader.learn(completion.positions)
    return Bridge(reader, vocabulary, same_vocabulary=same).first_token(
        completion.positions[:1], completion.text
    )


def token(name: str, reply: Reply | dict[str, Any], **options: Any) -> BridgedToken:
    bridged = read(name, reply, **options)
    assert bridged is not None
    return bridged


def test_the_most_likely_alternative_is_the_token_not_the_first_item(server: Loopback) -> None:
    large_token = ask_mlx(
        server,
        mlx_lm_reply(
            [(THE, "Ġthe"), (2, "a")],
            usage={
                "prompt_tokens": 12,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 11},
            },
        ),
    )
    assert (large_token.token_ids, large_token.text, large_token.logprob) == ((THE,), " the", -0.1)
    assert large_token.top == ((" the", -0.1), ("zz", -7.0))
    assert large_token.large_ids == (THE,)
    assert (
        large_token.prompt_tokens,
        large_token.cached_tokens,
        large_token.completion_tokens,
    ) == (12, 11, 2)
    assert large_token.uploaded_bytes == len(server.requests[-1].body)
    assert not large_token.is_eos


def test_mlx_lm_gets_boolean_logprobs_and_is_asked_for_one_spare_token(
    server: Loopback,
) -> None:
    ask_mlx(server, mlx_lm_reply([(THE, "Ġthe"), (2, "a")]))
    assert server.requests[-1].json == {
        "prompt": "x",
        "max_tokens": 2,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }


def test_equal_logprobs_go_to_the_lower_id_as_in_greedy_samplers() -> None:
    reply = mlx_lm_reply([(THE, "Ġthe"), (2, "a")], others=[(2, "a", -0.1), (9, "zz", -3.0)])
    assert token(MLX_LM, reply).token_ids == (2,)


def test_an_end_after_the_second_token_does_not_end_the_answer_at_the_first() -> None:
    reply = mlx_lm_reply([(THE, "Ġthe"), (END_ID, "<|im_end|>")], finish="stop")
    large_token = token(MLX_LM, reply)
    assert (large_token.token_ids, large_token.is_eos) == ((THE,), False)


def test_an_end_id_ends_the_answer_whatever_the_finish_reason() -> None:
    large_token = token(MLX_LM, mlx_lm_reply([(END_ID, "<|im_end|>"), (2, "a")]))
    assert (large_token.token_ids, large_token.text, large_token.is_eos) == ((END_ID,), "", True)


def test_a_foreign_end_token_becomes_the_small_models_end_token() -> None:
    large_token = token(MLX_LM, mlx_lm_reply([(7777, "</s>")], finish="stop"))
    assert (large_token.token_ids, large_token.text, large_token.is_eos) == ((END_ID,), "", True)


@pytest.mark.parametrize("same", [False, True])
def test_an_end_that_the_server_does_not_name_is_the_small_models_own(same: bool) -> None:
    class TwoEnds(TableVocabulary):
        eos_ids = frozenset({0, END_ID})

    bridge = Bridge(TokenReader(), TwoEnds(["Ġthe"]), same_vocabulary=same)
    unnamed = bridge.first_token([ReplyPosition(ReplyToken(text=""), ends=True)], "")
    assert unnamed is not None
    assert (unnamed.token_ids, unnamed.is_eos) == ((END_ID,), True)
    named = bridge.first_token([ReplyPosition(ReplyToken(piece="<s>"), ends=True)], "")
    assert named is not None
    assert (named.token_ids, named.is_eos) == ((0,), True)


def test_in_a_shared_vocabulary_a_fragment_keeps_its_id_and_has_no_text() -> None:
    fragment = VOCABULARY.id_of("Ã")
    large_token = token(MLX_LM, mlx_lm_reply([(fragment, "Ã"), (2, "Ġa")]), same=True)
    assert (large_token.token_ids, large_token.text, large_token.is_eos) == ((fragment,), "", False)
    assert large_token.top[0][0] == r"\xc3"


def test_a_fragment_of_another_vocabulary_is_not_passed_by_id() -> None:
    fragment = VOCABULARY.id_of("Ã")
    assert read(MLX_LM, mlx_lm_reply([(fragment, "Ã"), (2, "Ġa")])) is None


def test_a_committed_fragment_must_be_generated_again_first(server: Loopback) -> None:
    first, second = VOCABULARY.id_of("Ã"), VOCABULARY.id_of("©")
    with connected_client(server, MLX_LM, model="m", tokenizer=TableTokenizer(VOCABULARY)) as large:
        server.script.append(mlx_lm_reply([(first, "Ã"), (second, "©"), (2, "a")]))
        server.script.append(mlx_lm_reply([(2, "a"), (second, "©"), (2, "a")]))
        position_context = context("caf", VOCABULARY, fragment_ids=(first,))
        large_token = large.next_token(position_context)
        assert (large_token.token_ids, server.prompts[-1]) == ((second,), "caf")
        assert server.requests[-1].json["max_tokens"] == 3
        with pytest.raises(LargeProtocolError, match="did not continue"):
            large.next_token(position_context)


def test_a_token_of_another_vocabulary_is_spelled_by_its_bytes() -> None:
    small = TableVocabulary(["Ġ", "t", "he"])
    large_token = token(MLX_LM, mlx_lm_reply([(900, "Ġthe"), (901, "Ġ")]), vocabulary=small)
    assert (large_token.token_ids, large_token.text) == (small.encode(" the"), " the")
    assert large_token.large_ids == (900,)


def test_the_same_id_for_another_piece_is_not_passed_through() -> None:
    large_token = token(MLX_LM, mlx_lm_reply([(THE, "Ġt"), (2, "Ġa")]))
    assert large_token.token_ids == VOCABULARY.encode(" t") != (THE,)


@pytest.mark.parametrize(("piece", "text"), [("▁the", " the"), ("<0x65>", "e")])
def test_sentencepiece_pieces_are_decoded(piece: str, text: str) -> None:
    assert token(MLX_LM, mlx_lm_reply([(900, piece), (901, "▁a")])).text == text


@pytest.mark.parametrize("piece", ["<|im_start|>", "<think>", "[INST]", "<｜User｜>"])
def test_foreign_special_tokens_are_refused(piece: str) -> None:
    with pytest.raises(LargeNotContinued, match="no token for the large model's special token"):
        read(MLX_LM, mlx_lm_reply([(900, piece), (901, "Ġa")]))


def test_a_foreign_token_that_the_small_vocabulary_cannot_spell_is_refused() -> None:
    with pytest.raises(LargeProtocolError, match="cannot spell"):
        read(MLX_LM, mlx_lm_reply([(900, "Ā"), (901, "Ġa")]))


def test_a_foreign_fragment_is_completed_by_a_second_request(server: Loopback) -> None:
    small = TableVocabulary(["Ã©"])
    half = mlx_lm_reply([(900, "Ã"), (901, "©"), (902, "Ġa")])
    large_token = ask_mlx(server, half, half, vocabulary=small)
    assert (large_token.token_ids, large_token.text) == (small.encode("é"), "é")
    assert large_token.large_ids == (900, 901)
    assert [r.json["max_tokens"] for r in server.requests[-2:]] == [2, 3]
    assert large_token.uploaded_bytes == sum(len(r.body) for r in server.requests[-2:])


def test_a_character_that_is_never_completed_is_refused(server: Loopback) -> None:
    half = mlx_lm_reply([(900, "Ã"), *[(901, "Ã")] * 7, (902, "Ġa")])
    with pytest.raises(LargeProtocolError, match="no whole character"):
        ask_mlx(server, *[half] * 6)


def test_after_the_end_of_the_answer_there_is_no_further_request(server: Loopback) -> None:
    half = mlx_lm_reply([(900, "Ã"), (END_ID, "<|im_end|>")], finish="stop")
    with pytest.raises(LargeProtocolError, match="no whole character"):
        ask_mlx(server, half)


def test_a_begin_token_the_server_adds_itself_is_not_sent_twice(server: Loopback) -> None:
    small = TableVocabulary(["a"], bos_text="<s>")
    ask_mlx(server, mlx_lm_reply([(2, "a"), (2, "a")]), text="<s>[INST] hi", vocabulary=small)
    assert server.prompts[-1] == "[INST] hi"


def test_the_legacy_shape_gives_token_logprob_and_alternatives(server: Loopback) -> None:
    large_token = ask_plain(server, legacy(" the"))
    assert (large_token.token_ids, large_token.text, large_token.logprob) == ((THE,), " the", -0.5)
    assert large_token.top == ((" the", -0.5), ("a", -2.0))
    assert (large_token.prompt_tokens, large_token.cached_tokens) == (9, None)
    assert server.requests[-1].json == {
        "model": "m",
        "prompt": "x",
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 5,
    }


def test_ids_in_the_legacy_shape_pass_only_with_the_same_bytes() -> None:
    reply = legacy("b")
    reply["choices"][0]["logprobs"]["token_ids"] = [THE]
    assert token(PLAIN, reply).token_ids == (VOCABULARY.id_of("b"),)


def test_chat_logprobs_with_ids_and_bytes_are_read() -> None:
    the = {"id": THE, "token": " the", "bytes": list(b" the"), "logprob": -0.25}
    large_token = token(PLAIN, content_reply(the | {"top_logprobs": [the]}))
    assert (large_token.token_ids, large_token.text, large_token.top) == (
        (THE,),
        " the",
        ((" the", -0.25),),
    )


def test_a_reply_without_logprobs_still_gives_a_token(server: Loopback) -> None:
    large_token = ask_plain(server, content_reply(None, text=" the"))
    assert (large_token.text, large_token.logprob, large_token.top) == (" the", None, ())


@pytest.mark.parametrize(
    "reply",
    [
        legacy("", finish_reason="stop"),
        legacy("<|im_end|>", text="", finish_reason="stop"),
        content_reply({"id": 5, "token": "", "bytes": [], "logprob": -0.1}, finish_reason="stop"),
        content_reply(None, finish_reason="stop"),
        legacy("</s>", finish_reason="stop"),
    ],
)
def test_empty_text_with_stop_ends_the_answer(reply: dict[str, Any]) -> None:
    large_token = token(PLAIN, reply)
    assert (large_token.token_ids, large_token.text, large_token.is_eos) == ((END_ID,), "", True)


@pytest.mark.parametrize(
    "reply",
    [
        legacy(""),
        legacy("\ufffd"),
        content_reply(None),
        content_reply({"id": 5, "token": "", "bytes": [0xE2], "logprob": -0.1}, text=""),
        content_reply({"id": 5, "token": "\ufffd", "bytes": [239, 191, 189], "logprob": -0.1}),
    ],
)
def test_a_possible_part_of_a_character_is_requested_again_and_then_refused(
    server: Loopback, reply: dict[str, Any]
) -> None:
    assert read(PLAIN, reply) is None
    with pytest.raises(LargeProtocolError, match="no whole character"):
        ask_plain(server, *[reply] * 6)


@pytest.mark.parametrize(
    "reply",
    [
        legacy("Ã", text="\ufffd"),
        legacy(" the", text=" cat"),
        content_reply({"id": 5, "token": "a", "bytes": [97], "logprob": -0.1}, text="b"),
    ],
)
def test_a_text_that_differs_from_the_token_is_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(LargeProtocolError, match="differ"):
        read(PLAIN, reply)


def test_a_leading_space_in_either_text_or_token_is_kept() -> None:
    assert token(PLAIN, legacy("the", text=" the")).text == " the"


def test_a_text_only_server_is_not_asked_inside_a_character(server: Loopback) -> None:
    with connected_client(server, PLAIN, model="m") as large:
        asked = len(server.requests)
        with pytest.raises(LargeProtocolError, match="inside a character"):
            large.next_token(context("caf", VOCABULARY, fragment_ids=(VOCABULARY.id_of("Ã"),)))
        assert len(server.requests) == asked


def test_the_text_of_several_tokens_is_not_read_as_one(server: Loopback) -> None:
    """Some servers generate at least 16 tokens; here the first one has no text."""
    names = ["\ufffd", "\ufffd", " the"]
    logprobs = {"tokens": names, "token_logprobs": [-0.5] * 3, "top_logprobs": [{}] * 3}
    reply = legacy("", text="é the", logprobs=logprobs)
    with pytest.raises(LargeProtocolError, match="no whole character"):
        ask_plain(server, *[reply] * 2, *[legacy("")] * 4)


# The end of an answer, and text that only looks like a control token


def test_an_end_token_after_text_is_not_counted_twice() -> None:
    logprobs = {"tokens": ["b", "<|im_end|>"], "token_logprobs": [-0.5, -0.1]}
    reply = legacy("", text="b", finish_reason="stop", logprobs=logprobs)
    positions = dialect(PLAIN).completion(reply, Prompt(text="x")).positions
    assert [(position.token.text, position.ends) for position in positions] == [
        ("b", False),
        ("<|im_end|>", True),
    ]


@pytest.mark.parametrize("text", ["<div>", "</p>", "<br>", "[X]", "<T>"])
def test_html_tags_and_checkboxes_are_text(text: str) -> None:
    assert TokenReader().text_bytes(ReplyToken(text=text)) == text.encode()


def test_a_known_vocabulary_decides_which_tokens_are_special() -> None:
    large = TableVocabulary(["<div>", "a"])
    reader = TokenReader()
    reader.learn_vocabulary(large)
    tag = ReplyToken(token_id=large.id_of("<div>"), text="<div>")
    assert (reader.is_special(tag), reader.text_bytes(tag)) == (False, b"<div>")
    end = ReplyToken(token_id=END_ID, text="")
    assert (reader.is_special(end), reader.text_bytes(end)) == (True, b"")
    assert reader.ends(ReplyPosition(end))


def test_a_piece_that_contradicts_the_known_vocabulary_wins_over_the_id() -> None:
    reader = TokenReader()
    reader.learn_vocabulary(TableVocabulary(["a"]))
    assert reader.text_bytes(ReplyToken(token_id=2, piece="b")) == b"b"


def test_in_a_prompt_a_special_token_is_its_name() -> None:
    assert TokenReader().prompt_bytes(ReplyToken(piece="<|im_end|>")) == b"<|im_end|>"


# A server that has another model than before


@pytest.mark.parametrize(
    ("token", "is_right"),
    [
        (ReplyToken(token_id=4, data=b" the"), True),
        (ReplyToken(token_id=4, data=b"the"), True),
        (ReplyToken(token_id=4, text=" the"), True),
        (ReplyToken(token_id=4, data=b""), True),
        (ReplyToken(token_id=4, data=b" cat"), False),
        (ReplyToken(token_id=4, data="\ufffd".encode()), True),
        (ReplyToken(token_id=5, data="é".encode()), True),
        (ReplyToken(token_id=0, data=b"anything"), True),
        (ReplyToken(data=b" cat"), True),
    ],
)
def test_an_id_that_is_another_token_than_in_the_known_vocabulary_is_refused(
    token: ReplyToken, is_right: bool
) -> None:
    reader = TokenReader()
    position = ReplyPosition(token)
    reader.check([position])
    reader.learn_vocabulary(TableVocabulary(["a", "b", "Ġthe", "Ã"]))
    if is_right:
        reader.check([position])
    else:
        with pytest.raises(LargeProtocolError, match="the server has another model now"):
            reader.check([position])
    reader.forget()
    reader.check([position])


def test_another_model_under_the_same_address_is_noticed_and_negotiated_with() -> None:
    pieces = [piece for n in range(2, FAMILY.size) if (piece := FAMILY.piece(n)) is not None]
    other = FamilyServer("llama-server", vocabulary=TableVocabulary(pieces[::-1]))
    written = "pineapple pine"
    question = context(written, FAMILY, answer=FAMILY.encode(written))
    first = FamilyServer("llama-server", vocabulary=FAMILY)
    with Loopback(first) as server, LargeModel(server.url) as large:
        large.connect()
        assert large.pair_vocabulary(FAMILY)
        before = large.next_token(question)
        server.answer = other
        for _ in range(2):
            with pytest.raises(LargeProtocolError, match="has another model now"):
                large.next_token(question)
        after = large.next_token(question)
    # The text is now sent in ids of the other model's vocabulary.
    assert before.text == after.text == "apple"
