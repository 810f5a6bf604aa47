"""Load a model directory the way this machine's device runs it best.

On Metal and CUDA the weights stay as they are, quantised or not. MLX's CPU backend has no fast
quantised or half-precision kernels, so there they become dense float32.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from mlxroute.backend.memory import available_bytes
from mlxroute.errors import NotEnoughSpace, UsageError, WeightsError

# Interpreter, tokenizer, MLX and a KV cache of a few thousand tokens.
OVERHEAD_BYTES = 600 * 2**20
# What mlx_lm raises on configurations and weights that are not what they should be.
_BAD_FILES = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError)


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def memory_needed(path: Path) -> int:
    """Bytes that loading the model directory `path` keeps resident on this device."""
    files = sorted(path.glob("model*.safetensors"))
    if not on_cpu():
        return sum(file.stat().st_size for file in files) + OVERHEAD_BYTES
    config = _read_config(path)
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    try:
        bits = int(quantization.get("bits") or 4)
        return sum(_dense_bytes(file, bits) for file in files) + OVERHEAD_BYTES
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as exc:
        raise WeightsError(f"{path} is not a readable model: {_first_line(exc)}") from exc


def _dense_bytes(file: Path, bits: int) -> int:
    total = 0
    for name, entry in _safetensors_header(file).items():
        if name == "__metadata__" or name.endswith((".scales", ".biases")):
            continue
        count = math.prod(entry["shape"])
        # A packed weight holds 32 / bits values in each 32-bit word.
        total += 4 * count * (32 // bits if entry["dtype"] == "U32" else 1)
    return total


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(min(length, 100 * 2**20)))
    except (OSError, ValueError, struct.error) as exc:
        raise WeightsError(f"{file} is not a readable safetensors file ({exc})") from exc
    return header


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a table")
    except (OSError, ValueError) as exc:
        raise WeightsError(
            f"{path} has no readable config.json, so it is no model ({exc})"
        ) from exc
    return config


def check_memory(path: Path, *, role: str) -> None:
    """Raise NotEnoughSpace, with both figures, when the model at `path` does not fit in memory."""
    needed, available = memory_needed(path), available_bytes()
    if needed > available:
        raise NotEnoughSpace(
            f"the {role} model {path.name} needs {needed / 2**30:.1f} GiB of memory and"
            f" {available / 2**30:.1f} GiB are free; close programs or choose a smaller model"
            " (`mlxroute models`)"
        )


def load(path: Path, *, adapter: Path | None = None) -> tuple[Any, Any]:
    """Load model and tokenizer of the directory `path`, with LoRA weights of `adapter` if given.

    Returns the `mlx_lm` objects (`nn.Module`, `TokenizerWrapper`). Raises WeightsError when the
    files cannot be read as a model, UsageError when the adapter does not fit it.
    """
    import mlx.core as mx
    from mlx_lm.tokenizer_utils import load as load_tokenizer
    from mlx_lm.utils import dequantize_model, load_adapters, load_model

    dense = on_cpu()
    try:
        model, config = load_model(path, lazy=True)
        if dense:
            _widen(model)
            model = dequantize_model(model)
        mx.eval(model.parameters())
        # The narrow copies are of no more use.
        mx.clear_cache()
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except _BAD_FILES as exc:
        raise WeightsError(f"{path} cannot be loaded as a model: {_first_line(exc)}") from exc
    if adapter is not None:
        try:
            model = load_adapters(model, str(adapter))
        except _BAD_FILES as exc:
            raise UsageError(
                f"--adapter {adapter} is no MLX adapter (as `mlx_lm.lora` writes) that fits"
                f" {path.name}: {_first_line(exc)}"
            ) from exc
        if dense:
            _widen(model)
        mx.eval(model.parameters())
    model.eval()
    _wire_memory()
    return model, tokenizer


def _wire_memory() -> None:
    """Keep weights resident on Metal, to the same limit as `mlx_lm` sets while it decodes."""
    import mlx.core as mx

    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def _widen(model: Any) -> None:
    """Make floating-point weights float32, lazily, spread over the cores.

    Most of the time goes into the system's first touch of new memory, one core at a time.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    streams = [mx.new_stream(mx.Device(mx.cpu)) for _ in range(min(os.cpu_count() or 1, 4))]
    given = [0] * len(streams)
    wide = []
    for name, value in sorted(tree_flatten(model.parameters()), key=lambda item: -item[1].size):
        if mx.issubdtype(value.dtype, mx.floating):
            least = given.index(min(given))
            given[least] += value.size
            wide.append((name, value.astype(mx.float32, stream=streams[least])))
    model.update(tree_unflatten(wide))


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return " ".join(text.split())[:300] if text else type(exc).__name__
