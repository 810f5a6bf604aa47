"""Any text of a large model arrives unchanged in three real small vocabularies."""

from __future__ import annotations

import itertools
import math
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

# The most tokens that the client asks for to complete a character.
MAX_PARTS = 6
SMALL = {
    "smollm2": real_vocabularies.smollm2,
    "qwen": real_vocabularies.qwen,
    "mistral": real_vocabularies.mistral,
}
_CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}
# Where only text is known, a name in brackets reads as a control token, and the replacement
# character as part of a character.
NO_BRACKETS = ANY_TEXT.map(lambda text: re.sub("[<\\[\ufffd]", "", text))
CUTS = st.lists(st.integers(0, 60), max_size=12)


def cut(text: str, at: Sequence[int]) -> list[bytes]:
    """Cut the bytes of a text at these places, no character into more than four pieces."""
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
    """Translate large tokens one call at a time, as the client does."""
    bridge = Bridge(reader, small, same_vocabulary=same)
    ids: list[int] = []
    positions = [ReplyPosition(token) for token in tokens]
    reader.learn(positions)
    at = 0
    while at < len(positions):
        for count in range(1, MAX_PARTS + 1):
            read = positions[at : at + count]
            bridged = bridge.first_token(read, _served(read))
            if bridged is not None:
                break
        else:
            raise AssertionError("no whole character")
        data = b"".join(map(small.token_bytes, bridged.token_ids))
        assert same or bridged.text.encode() == data
        ids.extend(bridged.token_ids)
        at += _tokens_in(data, positions[at:])
    return tuple(ids)


def _served(positions: Sequence[ReplyPosition]) -> str:
    return b"".join(_BYTES[position.token] for position in positions).decode(errors="replace")


_BYTES: dict[ReplyToken, bytes] = {}


def _tokens_in(data: bytes, positions: Sequence[ReplyPosition]) -> int:
    """Return how many of the tokens are exactly these bytes."""
    size = 0
    for count, position in enumerate(positions, start=1):
        size += len(_BYTES[position.token])
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
        # Parts of characters, and text with the space mark itself, come byte by byte.
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
def test_ids_of_the_same_vocabulary_pass_through_unchanged(
    small: TokenVocabulary, text: str
) -> None:
    ids = small.encode(text)
    reader = TokenReader()
    reader.learn_vocabulary(small)
    tokens = [named(ReplyToken(token_id=i), small.token_bytes(i)) for i in ids]
    assert translated(tokens, small, reader, same=True) == ids


@given(text=NO_BRACKETS, at=CUTS)
@settings(max_examples=40, deadline=None)
def test_fragments_without_bytes_are_read_from_the_servers_own_decoding(
    small: TokenVocabulary, text: str, at: list[int]
) -> None:
    """On a text-only server a fragment is empty text or the replacement character."""
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


def test_a_token_that_ends_inside_a_character_waits_for_the_rest() -> None:
    small = TableVocabulary(["a", "Ã©"])
    bridge = Bridge(TokenReader(), small, same_vocabulary=False)
    first = ReplyPosition(ReplyToken(data=b"a\xc3", token_id=70))
    second = ReplyPosition(ReplyToken(data=b"\xa9", token_id=71))
    third = ReplyPosition(ReplyToken(data=b"a", token_id=72))
    assert bridge.first_token([first], "a\ufffd") is None
    bridged = bridge.first_token([first, second, third], "aéa")
    assert bridged is not None
    assert (bridged.text, bridged.token_ids, bridged.large_ids) == (
        "aé",
        small.encode("aé"),
        (70, 71),
    )


def test_an_end_token_keeps_its_id_only_in_the_same_vocabulary() -> None:
    small = TableVocabulary(["a"])
    for same, token_id, piece in [(True, 1, None), (False, 500, "</s>"), (False, 1, "<|im_end|>")]:
        bridge = Bridge(TokenReader(), small, same_vocabulary=same)
        bridged = bridge.first_token(
            [ReplyPosition(ReplyToken(token_id=token_id, piece=piece), ends=not same)], ""
        )
        assert bridged is not None
        assert (bridged.is_eos, bridged.token_ids, bridged.text) == (True, (1,), "")
        assert bridged.large_ids == (token_id,)


def test_an_end_after_a_fragment_does_not_complete_it() -> None:
    bridge = Bridge(TokenReader(), TableVocabulary(["a"]), same_vocabulary=False)
    part, end = (
        ReplyPosition(ReplyToken(data=b"\xc3")),
        ReplyPosition(ReplyToken(text=""), ends=True),
    )
    assert bridge.first_token([part, end], "\ufffd") is None
    assert bridge.first_token([ReplyPosition(ReplyToken()), end], "x") is None


def test_a_special_token_after_a_fragment_is_an_error_that_names_it() -> None:
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
    bridged = bridge.first_token([ReplyPosition(ReplyToken(data=b"a"), top)], "a")
    assert bridged is not None
    assert bridged.top == (("a", -0.1), (r"\xc3", -1.0), ("", -2.0), ("#77", -3.0))


@pytest.mark.parametrize("same_vocabulary", [False, True])
def test_the_logprob_of_the_end_is_that_of_all_end_tokens(same_vocabulary: bool) -> None:
    reader, small = TokenReader(), TableVocabulary(["a", "b"])
    reader.learn_vocabulary(small)
    (end_id,) = small.eos_ids
    ending = (
        ReplyToken(token_id=end_id, logprob=-1.0),
        ReplyToken(piece=small.piece(end_id), text="", logprob=-1.5),
        ReplyToken(text=small.piece(end_id) or "", logprob=-3.0),
        ReplyToken(token_id=end_id),
    )
    others = (
        ReplyToken(token_id=end_id + 1, logprob=-0.9),
        ReplyToken(piece="<|im_start|>", logprob=-2.0),
    )
    bridge = Bridge(reader, small, same_vocabulary=same_vocabulary)

    def end_logprob(*top: ReplyToken) -> float | None:
        bridged = bridge.first_token([ReplyPosition(ReplyToken(token_id=end_id + 1), top)], "a")
        assert bridged is not None
        return bridged.end_logprob

    total = math.exp(-1.0) + math.exp(-1.5) + math.exp(-3.0)
    assert end_logprob(*others, *ending) == pytest.approx(math.log(total))
    assert end_logprob(*others) is None
    assert end_logprob() is None
