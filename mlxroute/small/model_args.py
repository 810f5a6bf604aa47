"""Values of a loaded model's arguments, which `mlx_lm` keeps as objects and as dictionaries."""

from __future__ import annotations

from typing import Any


def find_argument(model: Any, *keys: str) -> Any:
    """Return the first value that a model's arguments have under one of the keys; None if none.

    The arguments of its language part count too.
    """
    for holder in (model, getattr(model, "language_model", None)):
        args = getattr(holder, "args", None)
        for table in (args, _value(args, "text_config")):
            for key in keys:
                if value := _value(table, key):
                    return value
    return None


def _value(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else getattr(table, key, None)
