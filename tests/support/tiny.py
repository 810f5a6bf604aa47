"""Model directories with a few thousand random weights, written in milliseconds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxroute.small import SmallModel

END = "<|im_end|>"
START = "<|im_start|>"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WINDOW = 32
# Architectures with plain caches, sliding windows, and states that cannot be rolled back.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 16, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "lfm2": {
        **{"norm_eps": 1e-6, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64},
        **{"block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0},
        **{"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    },
}
_TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "def main():\n\treturn 42  # answers everything",
    "Ünïcödé, 漢字かな, naïve café \U0001f600\U0001f680 e\u0301",
]


def make_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    context: int = 512,
    tied: bool = True,
    quantized: bool = False,
    model_type: str = "llama",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a random two-layer model and a byte-level tokenizer that `mlx_lm` loads.

    `context` is the model's limit in tokens; `extra` is added to its configuration.
    """
    import mlx.core as mx

    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 320,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        **(extra or {}),
    }
    path.mkdir(parents=True, exist_ok=True)
    key = json.dumps([config, seed, quantized])
    if key not in _FILES:
        with tempfile.TemporaryDirectory() as folder:
            _write_model(Path(folder), config, seed=seed, quantized=quantized)
            _FILES[key] = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    for name, data in _FILES[key].items():
        (path / name).write_bytes(data)
    # A caller that draws more numbers gets the same ones whether the model was new or not.
    mx.random.seed(seed)
    return path


# Files of the models that were made so far: many tests start with the same one.
_FILES: dict[str, dict[str, bytes]] = {}


def _write_model(path: Path, config: dict[str, Any], *, seed: int, quantized: bool) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    vocabulary_size = _write_tokenizer(path)
    assert vocabulary_size == config["vocab_size"]
    (path / "config.json").write_text(json.dumps(config))
    mx.random.seed(seed)
    model, _ = load_model(path, lazy=True, strict=False)
    model.apply(lambda value: mx.random.normal(value.shape) * 0.3)
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
        config = {**config, "quantization": {"group_size": 32, "bits": 4}}
        (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )


def final_hidden_state(small: SmallModel, ids: Sequence[int]) -> mx.array:
    """The final hidden state after some token ids, [D], from a forward pass without KV cache."""
    import mlx.core as mx

    state: mx.array = small.model.model(mx.array([list(ids)]))[0, -1]
    return state


def teach_days(path: Path) -> None:
    """Make an untied tiny model write `d` after `s`, so that it continues `Thurs` with `d`.

    A probe takes that as proof that a server continues a text.
    """
    teach_next(path, "s", "d")


def teach_next(path: Path, token: str, following: str) -> None:
    """Make an untied tiny model write one token after another; both by their names."""
    import mlx.core as mx

    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    file = str(path / "model.safetensors")
    weights: dict[str, mx.array] = mx.load(file)  # type: ignore[assignment]
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    # So large that no layer changes its direction, which is added to the output row.
    embedding[vocabulary[token]] *= 30
    direction = embedding[vocabulary[token]] * weights["model.norm.weight"]
    head[vocabulary[following]] += 3 * direction / mx.linalg.norm(direction)
    mx.eval(weights)
    mx.save_safetensors(file, weights, {"format": "mlx"})


def _write_tokenizer(path: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())
