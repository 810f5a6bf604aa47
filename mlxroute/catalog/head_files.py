"""Files of learned heads, one for each small model.

A head is `heads/<key>.safetensors` in the user's catalogue folder, where `mlxroute train` writes
it, or in the shipped one; see `model_keys`. The user's head takes precedence.
"""

from __future__ import annotations

from pathlib import Path

from mlxroute.catalog import shipped_dir
from mlxroute.catalog.model_keys import model_key


def user_head_file(small: str, folder: Path) -> Path:
    """Return the path of a small model's head in the user's catalogue folder.

    `small` is a model's name or path. Raises as `model_key`.
    """
    return _head_file(folder, model_key(small, folder))


def find_head_file(small: str, folder: Path) -> Path | None:
    """Return the user's head for a small model, else the shipped one; None if neither exists.

    `folder` is the user's catalogue folder. Raises as `model_key`.
    """
    key = model_key(small, folder)
    files = (_head_file(parent, key) for parent in (folder, shipped_dir()))
    return next((file for file in files if file.is_file()), None)


def _head_file(folder: Path, key: str) -> Path:
    return folder / "heads" / f"{key}.safetensors"
