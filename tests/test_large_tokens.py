"""What a reply means: which token it names, and in whose vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlxroute.errors import (
    LargeProtocolError,
)
from mlxroute.large import LargeModel
from tests.asking import THE, VOCABULARY, ask_mlx, ask_plain, contents, legacy
from tests.loopback import REFUSES_NUMBER, Loopback, Reply, mlx_lm_reply
from tests.vocabularies import END_ID, TableVocabulary, context


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback() as loopback:
        yield loopback


def test_the_most_likely_alternative_is_the_token_not_the_first_entry(server: Loopback) -> None:
    token = ask_mlx(
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
    assert (token.token_ids, token.text, token.logprob) == ((THE,), " the", -0.1)
    assert token.top == ((" the", -0.1), ("zz", -7.0))
    assert (token.prompt_tokens, token.cached_tokens, token.completion_tokens) == (12, 11, 2)
    assert token.uploaded_bytes == len(server.requests[-1].body)
    assert not token.is_eos


def test_mlx_lm_is_asked_with_a_boolean_and_for_one_token_more_than_is_read(
    server: Loopback,
) -> None:
    ask_mlx(server, mlx_lm_reply([(THE, "Ġthe"), (2, "a")]))
    assert server.requests[0].json["logprobs"] == 5
    assert server.requests[-1].json == {
        "prompt": "x",
        "max_tokens": 2,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }


def test_equal_logprobs_are_settled_as_the_greedy_sampler_does_by_the_lower_id(
    server: Loopback,
) -> None:
    reply = mlx_lm_reply([(THE, "Ġthe"), (2, "a")], others=[(2, "a", -0.1), (9, "zz", -3.0)])
    assert ask_mlx(server, reply).token_ids == (2,)


def test_an_end_after_the_second_token_does_not_end_the_answer_at_the_first(
    server: Loopback,
) -> None:
    token = ask_mlx(server, mlx_lm_reply([(THE, "Ġthe"), (END_ID, "<|im_end|>")], finish="stop"))
    assert (token.token_ids, token.is_eos) == ((THE,), False)


def test_the_end_is_told_by_id_whatever_the_finish_reason(server: Loopback) -> None:
    token = ask_mlx(server, mlx_lm_reply([(END_ID, "<|im_end|>"), (2, "a")]))
    assert (token.token_ids, token.text, token.is_eos) == ((END_ID,), "", True)


def test_a_foreign_end_token_becomes_the_small_models_own(server: Loopback) -> None:
    token = ask_mlx(server, mlx_lm_reply([(7777, "</s>")], finish="stop"))
    assert (token.token_ids, token.text, token.is_eos) == ((END_ID,), "", True)


def test_a_fragment_passes_by_id_and_shows_no_text(server: Loopback) -> None:
    fragment = VOCABULARY.id_of("Ã")
    token = ask_mlx(server, mlx_lm_reply([(fragment, "Ã"), (2, "a")]))
    assert (token.token_ids, token.text, token.is_eos) == ((fragment,), "", False)
    assert token.top[0][0] == r"\xc3"


def test_a_fragment_before_the_wanted_token_must_be_repeated(server: Loopback) -> None:
    first, second = VOCABULARY.id_of("Ã"), VOCABULARY.id_of("©")
    server.script.extend([REFUSES_NUMBER, Reply.of({}, status=404)])
    server.script.append(mlx_lm_reply([(first, "Ã"), (second, "©"), (2, "a")]))
    server.script.append(mlx_lm_reply([(2, "a"), (second, "©"), (2, "a")]))
    with LargeModel(server.url) as large:
        wanted = context("caf", VOCABULARY, fragment_ids=(first,))
        token = large.next_token(wanted)
        assert (token.token_ids, server.prompts[-1]) == ((second,), "caf")
        assert server.requests[-1].json["max_tokens"] == 3
        with pytest.raises(LargeProtocolError, match="did not continue"):
            large.next_token(wanted)


def test_a_token_of_another_vocabulary_is_spelled_by_its_bytes(server: Loopback) -> None:
    small = TableVocabulary(["Ġ", "t", "he"])
    token = ask_mlx(server, mlx_lm_reply([(900, "Ġthe"), (901, "Ġ")]), vocabulary=small)
    assert (token.token_ids, token.text) == (small.encode(" the"), " the")


def test_the_same_id_for_another_piece_is_not_passed_through(server: Loopback) -> None:
    token = ask_mlx(server, mlx_lm_reply([(THE, "Ġt"), (2, "Ġa")]))
    assert token.token_ids == VOCABULARY.encode(" t") != (THE,)


@pytest.mark.parametrize(("piece", "text"), [("▁the", " the"), ("<0x65>", "e")])
def test_sentencepiece_pieces_are_understood(server: Loopback, piece: str, text: str) -> None:
    token = ask_mlx(server, mlx_lm_reply([(900, piece), (901, "▁a")]))
    assert token.text == text


@pytest.mark.parametrize("piece", ["<|im_start|>", "<think>", "[INST]", "<｜User｜>", "Ã", "Ā"])
def test_foreign_special_tokens_and_fragments_are_no_text(server: Loopback, piece: str) -> None:
    with pytest.raises(LargeProtocolError):
        ask_mlx(server, mlx_lm_reply([(900, piece), (901, "Ġa")]))


def test_a_begin_token_the_server_adds_itself_is_not_sent_twice(server: Loopback) -> None:
    small = TableVocabulary(["a"], bos_text="<s>")
    ask_mlx(server, mlx_lm_reply([(2, "a"), (2, "a")]), text="<s>[INST] hi", vocabulary=small)
    assert server.prompts[-1] == "[INST] hi"


def test_the_legacy_shape_gives_token_logprob_and_alternatives(server: Loopback) -> None:
    token = ask_plain(server, legacy(" the"))
    assert (token.token_ids, token.text, token.logprob) == ((THE,), " the", -0.5)
    assert token.top == ((" the", -0.5), ("a", -2.0))
    assert (token.prompt_tokens, token.cached_tokens) == (9, None)
    assert server.requests[-1].json == {
        "model": "m",
        "prompt": "x",
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 5,
    }


def test_ids_in_the_legacy_shape_pass_only_with_the_same_bytes(server: Loopback) -> None:
    reply = legacy("b")
    reply["choices"][0]["logprobs"]["token_ids"] = [THE]
    assert ask_plain(server, reply).token_ids == (VOCABULARY.id_of("b"),)


def test_content_with_ids_and_bytes_is_understood(server: Loopback) -> None:
    the = {"id": THE, "token": " the", "bytes": list(b" the"), "logprob": -0.25}
    token = ask_plain(server, contents(the | {"top_logprobs": [the]}))
    assert (token.token_ids, token.text, token.logprob) == ((THE,), " the", -0.25)


def test_a_server_without_logprobs_still_gives_its_token(server: Loopback) -> None:
    reply = contents(None, text=" the")
    token = ask_plain(server, reply)
    assert (token.text, token.logprob, token.top) == (" the", None, ())


@pytest.mark.parametrize(
    "reply",
    [
        legacy("", finish_reason="stop"),
        legacy("<|im_end|>", text="", finish_reason="stop"),
        contents({"id": 5, "token": "", "bytes": [], "logprob": -0.1}, finish_reason="stop"),
        contents(None, finish_reason="stop"),
        legacy("</s>", finish_reason="stop"),
    ],
)
def test_empty_text_and_stop_is_the_end(server: Loopback, reply: dict[str, Any]) -> None:
    token = ask_plain(server, reply)
    assert (token.token_ids, token.text, token.is_eos) == ((END_ID,), "", True)


@pytest.mark.parametrize(
    "reply",
    [
        legacy(""),
        legacy("\ufffd"),
        legacy("Ã", text="\ufffd"),
        legacy(" the", text=" cat"),
        contents(None),
        contents({"id": 5, "token": "", "bytes": [0xE2], "logprob": -0.1}),
        contents({"id": 5, "token": "a", "bytes": [97], "logprob": -0.1}, text="b"),
    ],
)
def test_text_that_may_be_part_of_a_character_is_refused(
    server: Loopback, reply: dict[str, Any]
) -> None:
    with pytest.raises(LargeProtocolError):
        ask_plain(server, reply)


def test_a_space_that_one_of_two_accounts_lost_is_kept(server: Loopback) -> None:
    assert ask_plain(server, legacy("the", text=" the")).text == " the"


def test_a_text_only_server_is_not_asked_inside_a_character(server: Loopback) -> None:
    server.script.append(Reply.of(legacy("4")))
    with LargeModel(server.url, model="m") as large:
        large.connect()
        asked = len(server.requests)
        with pytest.raises(LargeProtocolError, match="inside a character"):
            large.next_token(context("caf", VOCABULARY, fragment_ids=(VOCABULARY.id_of("Ã"),)))
        assert len(server.requests) == asked
