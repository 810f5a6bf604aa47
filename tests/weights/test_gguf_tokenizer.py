"""The tokenizer taken from a GGUF file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlxroute.errors import WeightsError
from mlxroute.types import no_progress
from mlxroute.weights.gguf_convert import write_model
from mlxroute.weights.gguf_file import read_gguf
from mlxroute.weights.gguf_tokenizer import build_tokenizer
from tests.support.gguf_files import TinyModel, write_gguf
from tests.support.real_vocabularies import sentencepiece_type

TEXTS = [
    "def f(x):\n\treturn x  # 12345\r\n\n\n",
    "日本語の文字、中文字符，안녕하세요",
    "🙂👩‍👩‍👧 e\u0301 ñ ﬁ",
    "  leading and trailing  ",
    "don't I'VE they'll",
    "",
]


def tokenizer_of(path: Path) -> Any:
    return Tokenizer.from_str(json.dumps(build_tokenizer(read_gguf(path)).tokenizer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "default"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(pre: str, text: str, tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": False}
    source = write_gguf(tmp_path / "m.gguf", TinyModel(pre=pre, metadata=metadata))
    tokenizer = tokenizer_of(source)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.fixture(scope="module")
def qwen2(folder: Path) -> Any:
    return tokenizer_of(write_gguf(folder / "qwen2.gguf", TinyModel(pre="qwen2")))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_qwen2_text_survives_up_to_unicode_composition(text: str, qwen2: Any) -> None:
    import unicodedata

    assert qwen2.decode(qwen2.encode(text).ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("qwen2", "a 123\n\n b", ["a", "Ġ", "1", "2", "3", "ĊĊ", "Ġb"]),
        ("llama-bpe", "a 1234\n\n b", ["a", "Ġ", "123", "4", "ĊĊ", "Ġb"]),
        ("smollm", "a 123\n\n b", ["a", "Ġ", "1", "2", "3", "ĊĊ", "Ġb"]),
        ("gpt-2", "a 1234 b", ["a", "Ġ1234", "Ġb"]),
        ("default", "a 1234 +b", ["a", "Ġ", "123", "4", "Ġ", "+", "b"]),
    ],
)
def test_each_pre_tokenizer_splits_words_differently(
    pre: str, text: str, words: list[str], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", TinyModel(pre=pre)))
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words


def test_merges_control_and_padding_tokens_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", TinyModel()))
    assert tokenizer.encode("the the<|im_end|><tool>").ids == [257, 258, 261, 263]
    assert tokenizer.token_to_id("[PAD264]") is None
    assert tokenizer.get_vocab_size() == 264
    assert tokenizer.decode([257, 261]) == "the"


def test_begin_token_is_put_first_when_the_file_says_so(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": True}
    tokenizer = tokenizer_of(write_gguf(tmp_path / "m.gguf", TinyModel(metadata=metadata)))
    assert tokenizer.encode("the").ids == [259, 257]


def test_mlx_lm_sees_template_and_every_end_token(tmp_path: Path) -> None:
    from mlx_lm.utils import load

    gguf = read_gguf(write_gguf(tmp_path / "m.gguf", TinyModel()))
    out = tmp_path / "out"
    out.mkdir()
    write_model(gguf, out, tokenizer=build_tokenizer(gguf), label="", progress=no_progress)
    _, tokenizer = load(str(out))
    assert tokenizer.eos_token_ids == {261, 259}
    assert tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "the"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", [*TEXTS[:-1], "the theory of the thing: 3.14  ☃"])
def test_sentencepiece_gives_the_ids_of_the_original_library(
    text: str, prefix: bool, folder: Path
) -> None:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the theory of the thing is that the other one thinks"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    source = folder / f"spm-{prefix}.gguf"
    writer = GGUFWriter(source, "llama")
    ids = range(processor.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([sentencepiece_type(processor, i) for i in ids])
    writer.add_eos_token_id(processor.eos_id())
    writer.add_add_space_prefix(prefix)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = tokenizer_of(source)
    ids_wanted = processor.encode(text)
    assert tokenizer.encode(text).ids == ids_wanted
    assert tokenizer.decode(ids_wanted) == text


def test_a_file_without_end_token_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(WeightsError, match="names no token that ends an answer"):
        build_tokenizer(read_gguf(tmp_path / "m.gguf"))


def test_a_token_that_would_take_minutes_to_cut_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "a" * 1025, "</s>"])
    writer.add_token_scores([0.0, -1.0, 0.0])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(WeightsError, match="a token of 1,025 characters, more than 1,024"):
        build_tokenizer(read_gguf(tmp_path / "m.gguf"))
