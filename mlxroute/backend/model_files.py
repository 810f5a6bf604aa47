"""The files of a model directory, read within bounds: JSON files and safetensors headers.

What cannot be read is a WeightsError that names the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxroute.errors import WeightsError
from mlxroute.safe_text import printable_line
from mlxroute.untrusted_text import MalformedText, TextFile, parse_json

_MAX_JSON_BYTES = 64 << 20
_INDEX = "model.safetensors.index.json"
# What a quantised weight is computed with; AWQ and GPTQ files have the last two.
_NO_WEIGHTS = (".scales", ".biases", ".qzeros", ".g_idx")
# How llama.cpp names the parts of a split GGUF file.
_GGUF_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf", re.DOTALL)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model directory."""
    text = TextFile(file, "the model's file", _MAX_JSON_BYTES, WeightsError)
    try:
        value = parse_json(text.read(), strict=False)
    except MalformedText as exc:
        raise text.refuse(printable_line(str(exc))) from exc
    if not isinstance(value, dict):
        raise text.refuse("it is not a JSON object")
    return value


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model directory; raise WeightsError if one is missing."""
    files = sorted(path.glob("model*.safetensors"))
    if (path / _INDEX).exists():
        names = read_json_object(path / _INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise WeightsError(f"{path / _INDEX} has no weight_map")
        missing = sorted({str(name) for name in names.values()} - {file.name for file in files})
        if missing:
            raise WeightsError(f"{path} is incomplete: it has no {printable_line(missing[0])}")
    return files


def gguf_files(path: Path) -> list[Path]:
    """Return a GGUF file, or all parts of a split one; raise WeightsError if a part is missing."""
    match = _GGUF_PART.fullmatch(path.name)
    if match is None:
        return [path]
    parts = [
        path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf")
        for number in range(1, int(match[2]) + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise WeightsError(
                f"{path} is one part of a split GGUF, of which {part.name} is missing"
            )
    return parts


def read_tensors(file: Path) -> Mapping[str, Any]:
    """Return the tensors of a safetensors file as MLX arrays, whose data are not read yet.

    MLX checks the header: the shapes, the types, and that the data lie within the file.
    """
    import mlx.core as mx

    try:
        return dict(mx.load(str(file), format="safetensors"))  # type: ignore[arg-type]
    except (OSError, ValueError, RuntimeError, TypeError) as exc:
        raise WeightsError(
            f"{file} is not a readable safetensors file ({printable_line(str(exc), limit=120)})"
        ) from exc


def dense_float32_bytes(file: Path, bits: int) -> int:
    """Return the size of a safetensors file's weights as dense float32.

    `bits` is the number of bits of a quantised weight: 32-bit words hold several.
    """
    import mlx.core as mx

    # AWQ files have signed words.
    words = (mx.uint32, mx.int32)
    sizes = [
        int(tensor.size) * 32 // bits if tensor.dtype in words else int(tensor.size)
        for name, tensor in read_tensors(file).items()
        if not name.endswith(_NO_WEIGHTS)
    ]
    return 4 * sum(sizes)


def check_adapter(folder: Path) -> None:
    """Raise WeightsError for what `mlx_lm` would ignore in the files of an adapter."""
    config = read_json_object(folder / "adapter_config.json")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise WeightsError(f"fine_tune_type = {printable_line(repr(kind))} is not supported")
    parameters = config.get("lora_parameters", {})
    if kind != "full" and isinstance(parameters, dict):
        for key in parameters.keys() - {"rank", "scale", "dropout", "keys"}:
            raise WeightsError(f"lora_parameters.{printable_line(key)} is not supported")
    read_tensors(folder / "adapters.safetensors")
