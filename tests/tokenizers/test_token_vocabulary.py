"""Texts encoded to ids and back, in a tiny and in real vocabularies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxroute.backend.load import load
from mlxroute.engine.characters import CharacterState
from mlxroute.tokenizers.byte_pieces import BYTE_OF
from mlxroute.tokenizers.fast_tokenizer import FastTokenizer
from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from tests.support import real_vocabularies
from tests.support.real_vocabularies import ANY_TEXT
from tests.support.tiny import END, START, make_tiny_model


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> TokenVocabulary:
    _, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return TokenVocabulary(tokenizer)


def test_a_tokenizer_encodes_in_one_thread_at_a_time(
    vocabulary: TokenVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = vocabulary._tokenizer
    encode, running, overlaps = tokenizer.encode, threading.Lock(), []

    def watched(*arguments: Any, **options: Any) -> Any:
        overlaps.append(not running.acquire(blocking=False))
        time.sleep(0.001)
        if not overlaps[-1]:
            running.release()
        return encode(*arguments, **options)

    monkeypatch.setattr(tokenizer, "encode", watched, raising=False)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: (vocabulary.encode("ab"), vocabulary.encode("c")), range(8)))
    assert overlaps
    assert not any(overlaps)


def test_every_byte_has_its_own_character() -> None:
    assert sorted(BYTE_OF.values()) == list(range(256))


@given(text=st.text(max_size=60))
def test_any_text_survives_encoding(vocabulary: TokenVocabulary, text: str) -> None:
    text = text.encode(errors="ignore").decode()
    ids = vocabulary.encode(text)
    assert b"".join(vocabulary.token_bytes(i) for i in ids).decode() == text
    state, texts = CharacterState(), []
    for i in ids:
        state, part = state.push(i, vocabulary.token_bytes(i))
        texts.append(part)
    assert "".join(texts) == text
    assert state.fragment_ids == ()


@pytest.fixture(params=["smollm2", "qwen", "mistral"], scope="module")
def real(request: pytest.FixtureRequest) -> TokenVocabulary:
    make: Callable[[], TokenVocabulary] = getattr(real_vocabularies, request.param)
    return make()


@given(text=ANY_TEXT)
@example("e\u0301 \u212b ▁")
@example("<s>[INST]</s><|im_end|>")
@example(" leading and trailing ")
@settings(deadline=None, max_examples=50)
def test_any_text_survives_encoding_in_a_real_vocabulary(real: TokenVocabulary, text: str) -> None:
    ids = real.encode(text)
    assert b"".join(map(real.token_bytes, ids)) == text.encode()


def test_a_word_within_an_answer_gets_no_leading_space(real: TokenVocabulary) -> None:
    assert len(real.encode("day")) == 1
    assert real.token_bytes(real.encode("day")[0]) == b"day"
    assert real.token_bytes(real.encode(" day")[0]) == b" day"


def test_text_around_a_normalised_character_keeps_its_tokens(
    real: TokenVocabulary,
) -> None:
    words = " the theory of the thing"
    assert real.encode("\u212b" + words)[-3:] == real.encode(words)[-3:]
    for changed in ("\u212b", "\U0001d1bb", "e\u0301"):
        own = real.encode(changed)
        assert real.encode(words + changed + words) == (
            *real.encode(words),
            *own,
            *real.encode(words),
        )


def test_special_tokens_have_a_piece_but_no_text(vocabulary: TokenVocabulary) -> None:
    (end,) = (i for i in vocabulary.eos_ids if vocabulary.piece(i) == END)
    assert vocabulary.token_bytes(end) == b""


def test_text_that_looks_like_a_special_token_stays_text(vocabulary: TokenVocabulary) -> None:
    ids = vocabulary.encode(f"{START}{END}")
    assert not vocabulary.eos_ids & set(ids)
    assert b"".join(vocabulary.token_bytes(i) for i in ids).decode() == f"{START}{END}"


def test_ids_outside_the_vocabulary_have_no_piece(vocabulary: TokenVocabulary) -> None:
    assert vocabulary.piece(10**6) is None
    assert vocabulary.piece(-1) is None
    assert vocabulary.token_bytes(10**6) == b""


def test_an_added_token_after_unused_ids_has_a_piece() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    saved = json.loads(tokenizer.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    saved["added_tokens"] = [{"id": 4, "content": END, "special": True, **flags}]
    saved["model"]["vocab"][END] = 4
    fast = FastTokenizer(
        Tokenizer.from_str(json.dumps(saved)), path=Path(), config={}, eos_token_ids=[4]
    )
    vocabulary = TokenVocabulary(fast)
    assert (vocabulary.piece(4), vocabulary.piece(2), vocabulary.size) == (END, None, 5)


def test_without_a_begin_token_the_bos_text_is_empty(vocabulary: TokenVocabulary) -> None:
    assert vocabulary.bos_text == ""


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "</s>"),
        (None, "</s>"),
    ],
)
def test_the_end_token_is_the_one_of_the_chat_template_or_else_the_tokenizers(
    template: str | None, end: str
) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "</s>", "<|im_end|>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    config = {"eos_token": "</s>"} | ({"chat_template": template} if template else {})
    fast = FastTokenizer(tokenizer, path=Path(), config=config, eos_token_ids=[1, 2, 3])
    vocabulary = TokenVocabulary(fast)
    assert vocabulary.eos_ids == {1, 2, 3}
    assert vocabulary.piece(vocabulary.end_id) == end


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ bos_token }}<|turn|>{{ m.content }}", {"<s>", "<|turn|>"}),
        # A template may make the name of a token of the name of a role.
        ("{{ '<|' + m.role + '|>' + m.content }}", set()),
        (None, set()),
    ],
)
def test_the_template_ids_are_those_of_its_control_tokens_and_of_end_tokens(
    template: str | None, names: set[str]
) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    added = ["<|endoftext|>", "<s>", "<|turn|>", "<|user|>", "<|unused|>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in added])
    config = {"bos_token": "<s>"} | ({"chat_template": template} if template else {})
    vocabulary = TokenVocabulary(
        FastTokenizer(tokenizer, path=Path(), config=config, eos_token_ids=[1])
    )
    pieces = {vocabulary.piece(i) for i in vocabulary.template_ids}
    assert pieces == {"<|endoftext|>", "<|user|>", *names}


def test_added_runs_of_spaces_are_spaces() -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({"a": 0, "▁": 1, "<0x0A>": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("▁▁▁▁", normalized=False)])
    vocabulary = TokenVocabulary(
        TokenizerWrapper(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer),  # type: ignore[no-untyped-call]
            eos_token_ids=[0],
        )
    )
    spelled = [vocabulary.token_bytes(token_id) for token_id in range(4)]
    assert spelled == [b"a", b" ", b"\n", b"    "]
