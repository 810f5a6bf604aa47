"""Learned heads by the small model they read: the user's own, else the shipped one.

One safetensors file a model, `heads/<name>.safetensors`, in the user's catalogue folder or the
shipped one; `mlxroute train` writes the user's.
"""

from __future__ import annotations

from pathlib import Path

from mlxroute.catalog import shipped_dir


def user_head_file(small: str, folder: Path) -> Path:
    """Where the user's head for a model is kept."""
    return folder / "heads" / f"{Path(small).name}.safetensors"


def find_head_file(small: str, folder: Path) -> Path | None:
    """The head for a model, or None where there is none."""
    files = (user_head_file(small, parent) for parent in (folder, shipped_dir()))
    return next((file for file in files if file.is_file()), None)
