"""Any text that a large model may write arrives unchanged in three real small vocabularies."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.errors import LargeProtocolError
from mlxroute.large.reply import ReplyPosition, ReplyToken
from mlxroute.large.vocabulary.bridge import Bridge
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.tokenizers.byte_pieces import BYTE_OF
from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from tests.support import real_vocabularies
from tests.support.real_vocabularies import ANY_TEXT
from tests.support.vocabularies import TableVocabulary

# As many tokens as the client asks for at most to see a character whole.
MOST_PARTS = 6
SMALL = {
    "smollm2": real_vocabularies.smollm2,
    "qwen": real_vocabularies.qwen,
    "mistral": real_vocabularies.mistral,
}
_CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}
# A name in brackets alone is taken for a control token where nothing but its name is known, and
# the replacement character for part of a character where nothing but text is.
NO_BRACKETS = ANY_TEXT.map(lambda text: re.sub("[<\\[\ufffd]", "", text))
CUTS = st.lists(st.integers(0, 60), max_size=12)


def cut(text: str, at: Sequence[int]) -> list[bytes]:
    """The bytes of a text cut at these places, no character into more than four pieces."""
    data, ends = text.encode(), []
    whole = {len(text[:count].encode()) for count in range(len(text) + 1)}
    begun = 0
    for end in sorted({place for place in at if 0 < place < len(data)}):
        begun = 0 if end in whole else begun + 1
        if begun < 4:
            ends.append(end)
    bounds = [0, *ends, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds) if start < end]


def translated(
    tokens: Sequence[ReplyToken], small: TokenVocabulary, reader: TokenReader, *, same: bool = False
) -> tuple[int, ...]:
    """What becomes of large tokens asked for one call at a time, as the client does."""
    bridge = Bridge(reader, small, same_vocabulary=same)
    ids: list[int] = []
    entries = [ReplyPosition(token) for token in tokens]
    reader.learn(entries)
    at = 0
    while at < len(entries):
        for count in range(1, MOST_PARTS + 1):
            read = entries[at : at + count]
            bridged = bridge.first_token(read, _served(read))
            if bridged is not None:
                break
        else:
            raise AssertionError("no whole character")
        data = b"".join(map(small.token_bytes, bridged.token_ids))
        assert same or bridged.text.encode() == data
        ids.extend(bridged.token_ids)
        at += _tokens_in(data, entries[at:])
    return tuple(ids)


def _served(entries: Sequence[ReplyPosition]) -> str:
    return b"".join(_BYTES[entry.token] for entry in entries).decode(errors="replace")


_BYTES: dict[ReplyToken, bytes] = {}


def _tokens_in(data: bytes, entries: Sequence[ReplyPosition]) -> int:
    """How many of the tokens are just these bytes."""
    size = 0
    for count, entry in enumerate(entries, start=1):
        size += len(_BYTES[entry.token])
        if size == len(data):
            return count
    raise AssertionError("the small ids end inside a large token")


def named(token: ReplyToken, data: bytes) -> ReplyToken:
    _BYTES[token] = data
    return token


@pytest.fixture(autouse=True)
def _forget() -> None:
    _BYTES.clear()


@pytest.fixture(params=SMALL, scope="module")
def small(request: pytest.FixtureRequest) -> TokenVocabulary:
    make: Callable[[], TokenVocabulary] = SMALL[request.param]
    return make()


def arrives(text: str, ids: Sequence[int], small: TokenVocabulary) -> bool:
    return b"".join(map(small.token_bytes, ids)) == text.encode()


@given(text=NO_BRACKETS, at=CUTS)
@settings(max_examples=50, deadline=None)
def test_text_in_tokens_of_bytes_arrives(small: TokenVocabulary, text: str, at: list[int]) -> None:
    tokens = [
        named(ReplyToken(data=part, text=part.decode(errors="replace")), part)
        for part in cut(text, at)
    ]
    assert arrives(text, translated(tokens, small, TokenReader()), small)


@given(text=NO_BRACKETS, at=CUTS)
@settings(max_examples=50, deadline=None)
def test_text_in_byte_level_pieces_arrives(
    small: TokenVocabulary, text: str, at: list[int]
) -> None:
    tokens = [
        named(ReplyToken(piece="".join(_CHARACTER_OF[byte] for byte in part)), part)
        for part in cut(text, at)
    ]
    reader = TokenReader()
    reader.learn([ReplyPosition(ReplyToken(piece="Ġthe"))])
    assert arrives(text, translated(tokens, small, reader), small)


@given(text=NO_BRACKETS, at=CUTS)
@settings(max_examples=50, deadline=None)
def test_text_in_sentencepiece_pieces_arrives(
    small: TokenVocabulary, text: str, at: list[int]
) -> None:
    tokens = []
    for part in cut(text, at):
        shown = part.decode(errors="ignore")
        # What is no whole text, or holds the mark for a space, comes byte by byte.
        if shown.encode() == part and "▁" not in shown:
            tokens.append(named(ReplyToken(piece=shown.replace(" ", "▁")), part))
        else:
            tokens += [named(ReplyToken(piece=f"<0x{byte:02X}>"), bytes([byte])) for byte in part]
    reader = TokenReader()
    reader.learn([ReplyPosition(ReplyToken(piece="▁the"))])
    assert arrives(text, translated(tokens, small, reader), small)


@pytest.mark.parametrize("name", SMALL)
@given(text=ANY_TEXT)
@settings(max_examples=40, deadline=None)
def test_text_in_ids_of_a_known_vocabulary_arrives(
    small: TokenVocabulary, name: str, text: str
) -> None:
    large = SMALL[name]()
    reader = TokenReader()
    reader.learn_vocabulary(large)
    tokens = [named(ReplyToken(token_id=i), large.token_bytes(i)) for i in large.encode(text)]
    assert arrives(text, translated(tokens, small, reader, same=large is small), small)


@given(text=ANY_TEXT)
@settings(max_examples=40, deadline=None)
def test_ids_of_the_same_vocabulary_pass_through_as_they_are(
    small: TokenVocabulary, text: str
) -> None:
    ids = small.encode(text)
    reader = TokenReader()
    reader.learn_vocabulary(small)
    tokens = [named(ReplyToken(token_id=i), small.token_bytes(i)) for i in ids]
    assert translated(tokens, small, reader, same=True) == ids


@given(text=NO_BRACKETS, at=CUTS)
@settings(max_examples=40, deadline=None)
def test_where_fragments_have_no_bytes_the_servers_own_reading_does(
    small: TokenVocabulary, text: str, at: list[int]
) -> None:
    """A text-only server: part of a character is nothing, or the replacement character."""
    tokens = []
    for number, part in enumerate(cut(text, at)):
        shown = part.decode(errors="replace" if number % 2 else "ignore")
        whole = "\ufffd" not in shown and shown.encode() == part
        tokens.append(named(ReplyToken(text=shown if whole else "", logprob=-0.001 * number), part))
    assert arrives(text, translated(tokens, small, TokenReader()), small)


def test_a_character_that_the_small_vocabulary_lacks_is_refused() -> None:
    bridge = Bridge(TokenReader(), real_vocabularies.smollm2(), same_vocabulary=False)
    with pytest.raises(LargeProtocolError, match="cannot spell"):
        bridge.first_token([ReplyPosition(ReplyToken(data="a\U00040000".encode()))], "")


def test_a_token_that_leaves_a_character_begun_waits_for_its_end() -> None:
    small = TableVocabulary(["a", "Ã©"])
    bridge = Bridge(TokenReader(), small, same_vocabulary=False)
    first = ReplyPosition(ReplyToken(data=b"a\xc3", token_id=70))
    second = ReplyPosition(ReplyToken(data=b"\xa9", token_id=71))
    third = ReplyPosition(ReplyToken(data=b"a", token_id=72))
    assert bridge.first_token([first], "a\ufffd") is None
    found = bridge.first_token([first, second, third], "aéa")
    assert found is not None
    assert (found.text, found.token_ids, found.large_ids) == ("aé", small.encode("aé"), (70, 71))


def test_of_the_same_vocabulary_the_ends_id_is_kept_and_otherwise_it_is_the_small_models() -> None:
    small = TableVocabulary(["a"])
    for same, token_id, piece in [(True, 1, None), (False, 500, "</s>"), (False, 1, "<|im_end|>")]:
        bridge = Bridge(TokenReader(), small, same_vocabulary=same)
        found = bridge.first_token(
            [ReplyPosition(ReplyToken(token_id=token_id, piece=piece), ends=not same)], ""
        )
        assert found is not None
        assert (found.is_eos, found.token_ids, found.text) == (True, (1,), "")
        assert found.large_ids == (token_id,)


def test_an_end_behind_part_of_a_character_is_no_text() -> None:
    bridge = Bridge(TokenReader(), TableVocabulary(["a"]), same_vocabulary=False)
    part, end = (
        ReplyPosition(ReplyToken(data=b"\xc3")),
        ReplyPosition(ReplyToken(text=""), ends=True),
    )
    assert bridge.first_token([part, end], "\ufffd") is None
    assert bridge.first_token([ReplyPosition(ReplyToken()), end], "x") is None


def test_a_special_token_behind_part_of_a_character_is_named() -> None:
    bridge = Bridge(TokenReader(), TableVocabulary(["a"]), same_vocabulary=False)
    part, special = (
        ReplyPosition(ReplyToken(data=b"\xc3")),
        ReplyPosition(ReplyToken(piece="<|im_start|>")),
    )
    with pytest.raises(LargeProtocolError, match=r"<\|im_start\|>"):
        bridge.first_token([part, special], "")


def test_alternatives_are_shown_by_bytes_names_or_ids() -> None:
    top = (
        ReplyToken(data=b"a", logprob=-0.1),
        ReplyToken(data=b"\xc3", logprob=-1.0),
        ReplyToken(piece="<|im_end|>", logprob=-2.0),
        ReplyToken(token_id=77, logprob=-3.0),
        ReplyToken(text="b"),
    )
    bridge = Bridge(TokenReader(), TableVocabulary(["a"]), same_vocabulary=False)
    found = bridge.first_token([ReplyPosition(ReplyToken(data=b"a"), top)], "a")
    assert found is not None
    assert found.top == (("a", -0.1), (r"\xc3", -1.0), ("", -2.0), ("#77", -3.0))
