"""The part of file names that stands for a model: no two models have the same."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Final

from mlxroute.catalog.catalog import Catalog
from mlxroute.user_folders import expand_user

# What `adapted_name` adds to a model's name.
_ADAPTER: Final = re.compile(r"(\+[0-9a-f]{8})?$")
# Longest part of a path in a key, in characters of at most 4 bytes.
_MAX_CHARACTERS: Final = 50


def model_key(name: str, folder: Path) -> str:
    """Return the part of file names that stands for a small model.

    It is the catalogue name, the hub id with `--` for its slash, or that of `path_key` for a path.
    An adapter's fingerprint at the end of the name stays.

    Args:
        name: The name by which the model is chosen.
        folder: The user's catalogue folder.

    Raises:
        CatalogError: A catalogue file cannot be used.
        UsageError: `name` begins with `~NAME`, and there is no such user.
        ConfigError: `name` begins with `~`, and no home folder is known.
    """
    plain = plain_name(name)
    path = expand_user(plain)
    is_path = plain != "" and (is_gguf_name(path) or os.path.isdir(path))
    # A catalogue name takes precedence over a folder of the same name.
    if is_path and Catalog.load(folder).find_model(plain) is None:
        return path_key(path) + name.removeprefix(plain)
    return name.replace("/", "--")


def is_gguf_name(path: Path) -> bool:
    """Return whether a path is named as a GGUF file."""
    return path.suffix.lower() == ".gguf"


def path_key(path: Path) -> str:
    """Return the part of file names for a file or folder: its name and a hash of its path."""
    full_path = path.resolve()
    stem = path.stem if is_gguf_name(path) else full_path.name
    readable = re.sub(r"[^\w.-]+", "-", stem)[:_MAX_CHARACTERS]
    return f"{readable}-{hashlib.sha256(os.fsencode(full_path)).hexdigest()[:8]}"


def plain_name(name: str) -> str:
    """Return the name of a model without the fingerprint of an adapter."""
    return _ADAPTER.sub("", name)
