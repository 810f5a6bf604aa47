"""Conversion of GGUF files to MLX model directories: float16 weights and JSON files.

Tensors are converted in slabs, so that memory stays bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from mlxroute.errors import WeightsError
from mlxroute.types import Progress
from mlxroute.weights.gguf_config import build_config
from mlxroute.weights.gguf_file import GgufFile, GgufTensor, read_gguf
from mlxroute.weights.gguf_tensors import Bytes, Conversion, plan_conversions, read_rows
from mlxroute.weights.gguf_tokenizer import TokenizerFiles, build_tokenizer

SLAB_ELEMENTS = 1 << 20
"""Elements that are converted at a time."""

# `dequantize` works on 16 rows at a time; rows of at most this many elements fit the CPU's cache.
_ROW_ELEMENTS = 1 << 14


def check_convertible(path: Path) -> int:
    """Return the number of weights in a GGUF file, which can be converted as far as is known.

    Raises WeightsError if its header describes what cannot be converted exactly.
    """
    gguf = read_gguf(path)
    config = build_config(gguf, build_tokenizer(gguf))
    return sum(conversion.elements for conversion in plan_conversions(gguf, config))


def converted_bytes(gguf: GgufFile) -> int:
    """Return the size of the file's tensors as float16."""
    return sum(2 * tensor.elements for tensor in gguf.tensors.values())


def write_model(
    gguf: GgufFile, folder: Path, *, tokenizer: TokenizerFiles, label: str, progress: Progress
) -> dict[str, str]:
    """Write a model directory into `folder` and return the SHA-256 of its weights file, by name.

    Raises WeightsError for a model that cannot be converted exactly.
    """
    config = build_config(gguf, tokenizer)
    conversions = plan_conversions(gguf, config)
    weights = "model.safetensors"
    digest = _write_safetensors(conversions, gguf, folder / weights, label, progress)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    for file, table in {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer.tokenizer,
        "tokenizer_config.json": tokenizer.config,
    }.items():
        text = json.dumps(table, ensure_ascii=False, indent=None if file == "tokenizer.json" else 2)
        (folder / file).write_text(text + "\n", encoding="utf-8")
    return {weights: digest}


def _write_safetensors(
    conversions: list[Conversion], gguf: GgufFile, path: Path, label: str, progress: Progress
) -> str:
    """Write the tensors one slab at a time, in the order given, and return the file's SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    total = 0
    for conversion in conversions:
        end = total + 2 * conversion.elements
        header[conversion.name] = {
            "dtype": "F16",
            "shape": list(conversion.shape),
            "data_offsets": [total, end],
        }
        total = end
    header_text = json.dumps(header, separators=(",", ":")).encode()
    header_text += b" " * (-len(header_text) % 8)
    digest = hashlib.sha256()
    done = 0
    with open(path, "wb") as file:
        for chunk in (len(header_text).to_bytes(8, "little"), header_text):
            file.write(chunk)
            digest.update(chunk)
        progress(label, 0, total)
        # No fsync: if power fails, the sizes in the manifest reveal a half-written file.
        for slab in _convert_slabs(conversions, gguf):
            file.write(slab)
            digest.update(slab)
            done += slab.nbytes
            progress(label, done, total)
    return digest.hexdigest()


def _convert_slabs(conversions: list[Conversion], gguf: GgufFile) -> Iterator[memoryview]:
    """Yield the converted slabs of all tensors in order; several threads convert the next ones."""
    workers = min(os.cpu_count() or 1, 8)
    pending: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for conversion in conversions:
                tensor = conversion.source
                if tensor is None:
                    pending.append(pool.submit(_zeros, conversion.elements))
                    continue
                rows = read_rows(gguf, conversion)
                step = max(1, SLAB_ELEMENTS * len(rows) // conversion.elements)
                for start in range(0, len(rows), step):
                    if len(pending) > 2 * workers:
                        yield pending.popleft().result()
                    pending.append(pool.submit(_to_float16, rows[start : start + step], tensor))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _zeros(count: int) -> memoryview:
    return memoryview(bytes(2 * count))


def _to_float16(rows: Bytes, tensor: GgufTensor) -> memoryview:
    """Dequantise rows of blocks; raise WeightsError if a value does not fit float16."""
    block, size = GGML_QUANT_SIZES[tensor.kind]
    raw = np.ascontiguousarray(rows).reshape(-1)
    blocks = raw.size // size
    # Blocks are independent, so rows may have any length that divides the slab.
    blocks_per_row = next(
        n for n in range(max(1, _ROW_ELEMENTS // block), 0, -1) if blocks % n == 0
    )
    try:
        with np.errstate(over="raise", invalid="raise"):
            values = dequantize(raw.reshape(-1, blocks_per_row * size), tensor.kind)
            narrow = values.astype(np.float16).reshape(-1)
    except FloatingPointError as exc:
        raise WeightsError(f"tensor {tensor.name} holds values beyond float16") from exc
    if not np.isfinite(narrow).all():
        raise WeightsError(f"tensor {tensor.name} holds values that are not finite numbers")
    return memoryview(narrow).cast("B")
