"""Loading of model directories in the form that suits the device.

On Metal and CUDA the weights stay as they are, quantised or not. MLX's CPU backend has no fast
kernels for quantised or half-precision weights, so on the CPU they become dense float32.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.backend import memory
from mlxroute.backend.model_config import (
    CONTEXT_NOTE,
    check_understood,
    context_length,
    ignored_generation_settings,
    quantized_bits,
    read_config,
)
from mlxroute.backend.model_files import (
    check_adapter,
    dense_float32_bytes,
    gguf_files,
    read_tensors,
    weight_files,
)
from mlxroute.backend.plain_model import (
    is_plain,
    keep_embedding_narrow,
    load_plain_model,
    plain_architecture,
)
from mlxroute.errors import MlxRouteError, NotEnoughSpace, UsageError, WeightsError
from mlxroute.safe_text import error_text
from mlxroute.tokenizers.end_tokens import find_end_ids
from mlxroute.tokenizers.fast_tokenizer import (
    FastTokenizer,
    load_full_tokenizer,
    read_plain_tokenizer_config,
)
from mlxroute.types import Notify, no_notice

if TYPE_CHECKING:
    import mlx.core as mx

OVERHEAD_BYTES = 600 * 2**20
"""Memory beside the weights: interpreter, tokenizer, MLX, a KV cache of a few thousand tokens."""

# Rows that are transposed at a time, few enough for a fast cache.
_TRANSPOSED_ROWS = 256

# A KV cache of 8,192 tokens, from a tenth of the file (32B, Q4) to a fifth (1.5B, Q4).
_GGUF_CACHE_SHARE = 0.2


def on_cpu() -> bool:
    """Return whether MLX's default device is the CPU."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def memory_needed(path: Path) -> int:
    """Return the bytes of memory that a model takes on this device.

    Args:
        path: Model directory, or a GGUF file, which llama.cpp loads as it is, with the other parts
            if it is one of several.

    Raises:
        WeightsError: Its files cannot be read, or a part is missing.
    """
    if path.is_file():
        return gguf_memory_needed(sum(file.stat().st_size for file in gguf_files(path)))
    files = weight_files(path)
    if not on_cpu():
        return sum(file.stat().st_size for file in files) + OVERHEAD_BYTES
    try:
        bits = quantized_bits(read_config(path))
        return sum(dense_float32_bytes(file, bits) for file in files) + OVERHEAD_BYTES
    except (TypeError, ValueError, ArithmeticError) as exc:
        raise WeightsError(f"{path} is not a readable model: {error_text(exc)}") from exc


def gguf_memory_needed(file_bytes: int) -> int:
    """Return the bytes of memory that llama.cpp takes for a GGUF file of this size."""
    return file_bytes + int(file_bytes * _GGUF_CACHE_SHARE) + OVERHEAD_BYTES


def check_memory(path: Path, *, role: str) -> None:
    """Raise NotEnoughSpace if a model does not fit in free memory.

    Args:
        path: Model directory or GGUF file.
        role: "small" or "large", for the message.
    """
    require_memory(memory_needed(path), memory.available_bytes(), name=path.name, role=role)


def require_memory(needed: int, available: int, *, name: str, role: str) -> None:
    """Raise NotEnoughSpace if a model needs more bytes of memory than are free."""
    if needed > available:
        raise NotEnoughSpace(
            f"the {role} model {name} needs {needed / 2**30:.1f} GiB of memory and"
            f" {available / 2**30:.1f} GiB are free; close programs, choose a smaller model"
            " (`mlxroute models`), or skip this check",
            parameter="skip_memory_check",
        )


def load(
    path: Path,
    *,
    adapter: Path | None = None,
    full_tokenizer: bool = False,
    notify: Notify = no_notice,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer: the `mlx_lm` model, and its tokenizer or a FastTokenizer.

    Any thread can use the model: all its arrays are evaluated, also those that are not weights,
    such as scaled RoPE frequencies. A lazy array can be evaluated only in the thread that made it.

    Args:
        path: Model directory.
        adapter: Folder of LoRA weights as `mlx_lm.lora` writes. None (default) for none.
        full_tokenizer: Whether the tokenizer must be that of `mlx_lm`. False by default.
        notify: Receives a line if the context is shorter than the configuration says, and one for
            settings of generation_config.json that have no effect. Ignored by default.

    Raises:
        WeightsError: The files cannot be loaded, or `mlx_lm` ignores what they ask for.
        UsageError: The adapter does not fit the model.
    """
    import mlx.core as mx

    config = read_config(path)
    for file in weight_files(path):
        read_tensors(file)
    try:
        loaded = _load_plain(path, config) if adapter is None else None
        model, tokenizer, window = loaded or _load_with_mlx_lm(path, config)
    except MlxRouteError:
        raise
    except Exception as exc:
        raise WeightsError(f"{path} cannot be loaded as a model: {error_text(exc)}") from exc
    if full_tokenizer and isinstance(tokenizer, FastTokenizer):
        tokenizer = tokenizer.read_in_full()
    _add_end_tokens(tokenizer)
    if window is not None:
        notify(
            f"the context of {path.name} is {window:,} tokens here: mlx_lm ignores its sliding"
            " window, which has that size"
        )
    if ignored := ignored_generation_settings(path):
        notify(
            f"generation_config.json of {path.name} sets {', '.join(ignored)}, which has no effect"
            " here: the likeliest token is written, or one is sampled"
        )
    if adapter is not None:
        model = _add_adapter(model, adapter, path)
    # `mlx_lm` drops it from the arguments of architectures that compute without it.
    setattr(model, CONTEXT_NOTE, window or context_length(config))
    # Free the narrower copies of the weights.
    mx.clear_cache()
    model.eval()
    _wire_memory()
    return model, tokenizer


def _load_plain(path: Path, config: dict[str, Any]) -> tuple[Any, Any, int | None] | None:
    """Load a model and tokenizer that need no transformers; None if they do."""
    import mlx.core as mx

    if not is_plain(path, config) or read_plain_tokenizer_config(path) is None:
        return None
    window = check_understood(config, plain_architecture(config), path)
    with ThreadPoolExecutor(1) as pool:
        # Both take a while without Python's lock: the tokenizer is parsed, the weights are read.
        tokenizer = pool.submit(FastTokenizer.read, path, eos_token_ids=config.get("eos_token_id"))
        model = load_plain_model(path, config)
        if on_cpu():
            _widen(model, kept=keep_embedding_narrow(model))
        mx.eval(model.state)
    fast = tokenizer.result()
    return None if fast is None else (model, fast, window)


def _load_with_mlx_lm(path: Path, config: dict[str, Any]) -> tuple[Any, Any, int | None]:
    import mlx.core as mx
    from mlx_lm.utils import _get_classes, dequantize_model, load_model

    architecture = sys.modules[_get_classes(config)[0].__module__]
    window = check_understood(config, architecture, path)
    model, config = load_model(path, lazy=True, model_config=config)
    if on_cpu():
        _widen(model)
        model = dequantize_model(model)
        # Scales of one byte, as those of mxfp4, give bfloat16.
        _widen(model)
    mx.eval(model.state)
    tokenizer = load_full_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    # For an unknown token that is empty, transformers calls itself without end.
    list(tokenizer.all_special_ids)
    return model, tokenizer, window


def _add_end_tokens(tokenizer: Any) -> None:
    """Let the known end tokens of a vocabulary end answers too, whatever its files say."""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    # An end token that is not in the vocabulary has no id.
    named = set(tokenizer.eos_token_ids) - {None}
    tokenizer.eos_token_ids = {*named, *find_end_ids(ids)}


def _add_adapter(model: Any, adapter: Path, path: Path) -> Any:
    """Return a model with LoRA weights. Raises UsageError if they do not fit."""
    import mlx.core as mx
    from mlx_lm.utils import load_adapters

    try:
        check_adapter(adapter)
        model = load_adapters(model, str(adapter))
    except Exception as exc:
        raise UsageError(
            f"the adapter {adapter} is not an MLX adapter (as `mlx_lm.lora` writes) that fits"
            f" {path.name}: {error_text(exc)}",
            parameter="adapter",
        ) from exc
    if on_cpu():
        _widen(model)
    mx.eval(model.state)
    return model


def _wire_memory() -> None:
    """Keep weights resident on Metal, up to the limit that `mlx_lm` sets while it decodes."""
    import mlx.core as mx

    if mx.metal.is_available():
        # Where the default device of a Mac is the CPU, there is no limit.
        limit = mx.device_info().get("max_recommended_working_set_size")
        if limit is not None:
            mx.set_wired_limit(int(limit))


def _widen(model: Any, *, kept: frozenset[str] = frozenset()) -> None:
    """Convert floating-point weights but those `kept` to float32, lazily, on several streams.

    Of these weights, matrices that are multiplied are stored by columns: for one token, OpenBLAS
    multiplies those faster. Most of the time goes into the operating system's work when a thread
    first writes to new memory; the streams share it.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    narrow = [
        (name, value)
        for name, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
        and value.dtype != mx.float32
        and name not in kept
    ]
    count = min(os.cpu_count() or 1, 4, len(narrow))
    streams = [mx.new_stream(mx.Device(mx.cpu)) for _ in range(count)]
    loads = [0] * count
    multiplied = _multiplied_weights(model)
    wide = []
    for name, value in sorted(narrow, key=lambda item: -item[1].size):
        index = loads.index(min(loads))
        loads[index] += value.size
        with mx.stream(streams[index]):
            array = _by_columns(value) if name in multiplied else value
            wide.append((name, array.astype(mx.float32)))
    model.update(tree_unflatten(wide))


def _multiplied_weights(model: Any) -> frozenset[str]:
    """Return the names of the dense matrices of linear layers, and of a tied embedding."""
    import mlx.nn as nn

    tied = getattr(getattr(model, "args", None), "tie_word_embeddings", False)
    kinds = (nn.Linear, nn.Embedding) if tied else (nn.Linear,)
    return frozenset(
        f"{name}.weight" for name, part in model.named_modules() if type(part) in kinds
    )


def _by_columns(matrix: mx.array) -> mx.array:
    """Return an equal matrix, stored by columns."""
    import mlx.core as mx

    parts = [
        mx.contiguous(matrix[row : row + _TRANSPOSED_ROWS].T)
        for row in range(0, matrix.shape[0], _TRANSPOSED_ROWS)
    ]
    return mx.concatenate(parts, axis=1).T
