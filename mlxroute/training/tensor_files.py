"""Files of weights and labels, replaced in one step."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlxroute.replace_file import replacement


def write_tensors(
    path: Path,
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    *,
    is_private: bool = False,
) -> None:
    """Write a safetensors file; readers get the old file or the new one.

    Args:
        path: File to replace or create; its name ends in `.safetensors`.
        tensors: Arrays by name.
        metadata: Texts by name.
        is_private: Whether only its owner may read it. False by default.

    Raises:
        OSError: The file cannot be written; an old one stays.
    """
    with replacement(path, mode=0o600 if is_private else 0o666) as partial:
        try:
            mx.save_safetensors(str(partial), dict(tensors), dict(metadata))
        except RuntimeError as exc:
            raise OSError(errno.EIO, f"cannot be written ({exc})", str(path)) from exc
