"""Vocabularies compared by their files, by pieces in replies, or by a detokenise route."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxroute.errors import LargeRefused
from mlxroute.large.vocabulary.vocabulary_comparison import (
    compare_control_count,
    compare_decoded,
    compare_entries,
    compare_pieces,
    fingerprint,
)
from tests.support import family_servers
from tests.support.vocabularies import TableVocabulary

SMALL = TableVocabulary(["a", "b", "Ġ", "Ã", "©"], bos_text="<s>")
LARGE = family_servers.VOCABULARY
NAMES = "<s><|im_end|>"


def named(ids: Sequence[int]) -> str:
    """Decode ids of LARGE, control tokens by their names."""
    data = [LARGE.token_bytes(i) or (LARGE.piece(i) or "").encode() for i in ids]
    return b"".join(data).decode()


def unnamed(ids: Sequence[int]) -> str:
    """Decode ids of LARGE, without control tokens."""
    return b"".join(map(LARGE.token_bytes, ids)).decode()


def never(text: str) -> tuple[int, ...]:
    raise AssertionError(f"{text!r} was encoded")


def returning(text: str) -> Callable[[Sequence[int]], str]:
    return lambda ids: text


def test_padding_and_extra_ids_at_the_end_are_ignored() -> None:
    longer = TableVocabulary(["a", "b", "Ġ", "Ã", "©", "more", "<|extra|>"])
    assert compare_entries(SMALL, longer).is_same
    assert compare_entries(longer, SMALL).is_same


def test_one_token_that_differs_is_noticed() -> None:
    other = TableVocabulary(["a", "b", "Ġ", "Ä", "©"])
    assert compare_entries(SMALL, other).is_same is False
    assert fingerprint(SMALL) != fingerprint(other)
    assert fingerprint(SMALL) == fingerprint(TableVocabulary(["a", "b", "Ġ", "Ã", "©"]))
    assert fingerprint(TableVocabulary(["a", "bc"])) != fingerprint(TableVocabulary(["ab", "c"]))


def test_pieces_in_replies_decide_only_when_there_are_enough() -> None:
    pieces = {i: LARGE.piece(i) or "" for i in range(100)}
    assert compare_pieces(LARGE, pieces).is_same is True
    assert compare_pieces(LARGE, {i: pieces[i] for i in range(5)}).is_same is None
    assert compare_pieces(LARGE, pieces | {50: "other"}).is_same is False
    assert compare_pieces(LARGE, pieces | {10**6: "beyond"}).is_same is False


def test_a_detokenise_route_compares_whole_characters_in_few_calls() -> None:
    calls: list[Sequence[int]] = []

    def decode(ids: Sequence[int]) -> str:
        calls.append(ids)
        return named(ids)

    assert compare_decoded(LARGE, decode, never).is_same is True
    assert len(calls) == 1
    assert compare_decoded(LARGE, lambda ids: named(ids)[1:], never).is_same is False
    changed = compare_decoded(LARGE, lambda ids: named(ids).replace("pine", "fir"), never)
    assert changed.is_same is False


def test_control_tokens_that_differ_in_name_are_noticed() -> None:
    def decode(ids: Sequence[int]) -> str:
        return named(ids).replace("<|im_end|>", "<｜Assistant｜>")

    comparison = compare_decoded(LARGE, decode, never)
    assert comparison.is_same is False
    assert comparison.detail == "token 1 is '<|im_end|>' and '<｜Assistan'"

    def spaced(ids: Sequence[int]) -> str:
        return named(ids).replace(NAMES, " <s> <|im_end|>")

    assert compare_decoded(LARGE, spaced, never).is_same is True


def test_where_the_route_leaves_out_control_tokens_their_names_are_encoded() -> None:
    def encode(text: str) -> tuple[int, ...]:
        assert text == NAMES
        return (7, 0, 1)

    assert compare_decoded(LARGE, unnamed, encode).is_same is True
    # They may be others, or the server may not read names of control tokens at all.
    comparison = compare_decoded(LARGE, unnamed, LARGE.encode)
    assert comparison.is_same is None
    assert comparison.detail == "the server does not show the same control tokens"


def test_names_of_control_tokens_are_single_tokens_in_the_same_vocabulary() -> None:
    counts: dict[int | None, bool | None] = {2: True, 3: True, None: True, 1: False, 9: False}
    for count, is_same in counts.items():
        assert compare_control_count(LARGE, lambda text, n=count: n).is_same is is_same  # type: ignore[misc]


def test_a_leading_space_dropped_by_a_sentencepiece_route_is_ignored() -> None:
    words = TableVocabulary(["Ġthe", "Ġa", "b"])
    for text, is_same in {"the ab": True, " the ab": True, "the a b": False}.items():
        assert compare_decoded(words, returning(text + NAMES), never).is_same is is_same


def test_a_detokenise_route_that_fails_decides_nothing() -> None:
    def fails(ids: Sequence[int]) -> str:
        raise LargeRefused("/detokenize answered 404: Not Found")

    assert compare_decoded(LARGE, fails, never).is_same is None
    assert compare_decoded(TableVocabulary([]), returning(""), never).is_same is None


def test_a_difference_has_an_example_and_a_failure_its_reason() -> None:
    other = TableVocabulary(["a", "b", "Ġ", "Ä", "©"])
    assert compare_entries(SMALL, other).detail == "token 5 is 'Ã' and 'Ä'"
    pieces = {i: LARGE.piece(i) or "" for i in range(100)}
    assert compare_pieces(LARGE, pieces | {10**6: "x\x1b[2J"}).detail == (
        "token 1000000 is nothing and 'x\\x1b[2J'"
    )
    assert compare_pieces(LARGE, {}).detail == "the server names no ids"
    assert compare_pieces(LARGE, {0: pieces[0]}).detail == "the server names too few tokens by id"
    words = TableVocabulary(["Ġthe", "Ġa", "bc", "d"])
    for text, detail in {
        "the abcd" + NAMES: "",
        "the abxd": "token 4 is 'bc' and 'bx'",
        " the Abcd": "token 3 is ' a' and ' A'",
        "the abc": "token 5 is 'd' and ''",
        "": "token 2 is ' the' and ''",
    }.items():
        assert compare_decoded(words, returning(text), never).detail == detail
