"""The header of a GGUF file: its metadata, and the position of every tensor.

The `gguf` package's reader takes about ten seconds for a vocabulary of 150,000 entries; this one
takes a fraction of a second. Dequantisation is left to that package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlxroute.errors import WeightsError
from mlxroute.safe_text import printable_line
from mlxroute.weights.gguf_metadata import GgufMetadata

# Bounds on what a header may hold, far above those of any model: what is damaged is refused early.
_MAX_HEADER_BYTES = 512 << 20
_MAX_ITEMS = 1 << 23
_MAX_DIMENSIONS = 4
_MAX_NESTING = 4
_MAX_ALIGNMENT = 1 << 20
# The numbers of types that ggml may have one day; those it has end at about 40.
_MAX_TYPES = 256

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Args:
        name: Name of the tensor in the file.
        shape: Its shape, rows first (GGUF stores the reverse).
        kind: Quantisation type of its blocks.
        offset: Position of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Size of one row of quantised blocks in bytes."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // int(block) * int(size)

    @property
    def size_bytes(self) -> int:
        """Size of all rows in bytes."""
        return self.elements // self.shape[-1] * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file: its metadata, and its tensors by name."""

    path: Path
    metadata: GgufMetadata
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Model family, such as `llama`; empty if the file does not say."""
        return self.metadata.architecture

    def rows(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the quantised rows, uint8 [rows, row bytes], memory-mapped from the file."""
        shape = (tensor.size_bytes // tensor.row_bytes, tensor.row_bytes)
        return np.memmap(self.path, np.uint8, "r", tensor.offset, shape)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file; raise WeightsError if it is not one, or is damaged."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise WeightsError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _HeaderReader(view, path).read()
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (struct.error, ValueError, KeyError) as exc:
        reason = printable_line(str(exc))[:200]
        raise WeightsError(
            f"{path} is damaged: its header cannot be read ({reason}); download it again"
        ) from exc


def unsupported_type(path: Path, tensor: str, kind: str | int) -> WeightsError:
    """Return the error for a tensor whose type, a name or number, cannot be converted."""
    return WeightsError(
        f"{path}: tensor {tensor} has type {kind}, which is not supported; use a file of"
        " another quantisation, such as F16 or Q4_K_M"
    )


class _HeaderReader:
    """Reads a GGUF header from front to back, starting after its four magic bytes.

    struct.error, ValueError and KeyError mean that the header is damaged.
    """

    def __init__(self, view: mmap.mmap, path: Path) -> None:
        self._view = view
        self._path = path
        self._position = 4
        self._items_left = _MAX_ITEMS

    def read(self) -> GgufFile:
        self._check_version(self._scalar(GGUFValueType.UINT32))
        tensor_count = self._scalar(GGUFValueType.UINT64)
        metadata: dict[str, Any] = {}
        for _ in range(self._scalar(GGUFValueType.UINT64)):
            key = self._name()
            if key in metadata:
                raise ValueError(f"{key} occurs twice")
            metadata[key] = self._value(key, self._value_type(key))
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        checked = GgufMetadata(metadata, self._path)
        alignment = checked.integer("general.alignment", default=32, most=_MAX_ALIGNMENT)
        data_start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            tensor = GgufTensor(name, shape, kind, data_start + offset)
            if name in tensors:
                raise ValueError(f"tensor {name} occurs twice")
            if tensor.offset + tensor.size_bytes > len(self._view):
                raise WeightsError(
                    f"{self._path} is truncated: it ends inside tensor {name}; download it again"
                )
            tensors[name] = tensor
        return GgufFile(self._path, checked, tensors)

    def _check_version(self, version: int) -> None:
        if version in (2, 3):
            return
        if version & 0xFFFF == 0:
            raise WeightsError(
                f"{self._path} is a big-endian GGUF file; only little-endian ones are supported"
            )
        raise WeightsError(
            f"{self._path} is GGUF version {version}; only versions 2 and 3 are supported"
        )

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._name()
        dimensions = self._scalar(GGUFValueType.UINT32)
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        # GGUF lists the fastest-varying dimension first.
        shape = tuple(self._scalar(GGUFValueType.UINT64) for _ in range(dimensions))[::-1]
        kind = self._tensor_type(name)
        if not shape or 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name} has shape {shape}")
        return name, shape, kind, self._scalar(GGUFValueType.UINT64)

    def _tensor_type(self, name: str) -> GGMLQuantizationType:
        number = self._scalar(GGUFValueType.UINT32)
        try:
            return GGMLQuantizationType(number)
        except ValueError:
            if number < _MAX_TYPES:
                raise unsupported_type(self._path, name, number) from None
            raise

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._scalar(GGUFValueType.UINT32)
        try:
            return GGUFValueType(number)
        except ValueError:
            if number < _MAX_TYPES:
                reason = f"{key} has a value of type {number}, which is not supported"
                raise WeightsError(f"{self._path}: {reason}") from None
            raise

    def _value(self, key: str, kind: GGUFValueType, depth: int = 0) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is not GGUFValueType.ARRAY:
            return self._scalar(kind)
        item_kind = self._value_type(key)
        count = self._scalar(GGUFValueType.UINT64)
        self._items_left -= count
        if self._items_left < 0 or depth > _MAX_NESTING:
            raise ValueError("its lists are too long or too deep")
        if item_kind in _SCALARS:
            layout = np.dtype(_SCALARS[item_kind])
            start = self._take(count * layout.itemsize)
            return np.frombuffer(self._view, layout, count, start).tolist()
        return [self._value(key, item_kind, depth + 1) for _ in range(count)]

    def _scalar(self, kind: GGUFValueType) -> Any:
        layout = _SCALARS[kind]
        return struct.unpack_from(layout, self._view, self._take(struct.calcsize(layout)))[0]

    def _name(self) -> str:
        """Return the name of a value or tensor, which messages may print."""
        name = self._string()
        if not name.isprintable():
            raise ValueError(f"a name in it has control characters: {printable_line(name)[:50]}")
        return name

    def _string(self) -> str:
        length = self._scalar(GGUFValueType.UINT64)
        start = self._take(length)
        return self._view[start : start + length].decode("utf-8", errors="replace")

    def _take(self, count: int) -> int:
        """Advance by `count` bytes and return the position before; raise ValueError at the end."""
        start = self._position
        if start + count > min(len(self._view), _MAX_HEADER_BYTES):
            raise ValueError(f"it needs {start + count} bytes")
        self._position += count
        return start
