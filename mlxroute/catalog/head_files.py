"""Files of learned heads, one for each small model.

A head is `heads/<name>.safetensors` in the user's catalogue folder, where `mlxroute train` writes
it, or in the shipped one. The user's head takes precedence.
"""

from __future__ import annotations

from pathlib import Path

from mlxroute.catalog import shipped_dir


def user_head_file(small: str, folder: Path) -> Path:
    """Return the path of a small model's head in the user's catalogue folder.

    `small` is a model's name or the path of its folder.
    """
    return folder / "heads" / f"{Path(small).name}.safetensors"


def find_head_file(small: str, folder: Path) -> Path | None:
    """Return the user's head for a small model, else the shipped one; None if neither exists."""
    files = (user_head_file(small, parent) for parent in (folder, shipped_dir()))
    return next((file for file in files if file.is_file()), None)
