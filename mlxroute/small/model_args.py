"""Values of a loaded model's arguments, which `mlx_lm` keeps as objects and as dictionaries."""

from __future__ import annotations

from typing import Any

from mlxroute.backend.model_config import CONTEXT_KEYS, CONTEXT_NOTE, LONGEST_CONTEXT

_DEFAULT_CONTEXT = 4096


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


def find_context_length(model: Any, *, is_recurrent: bool) -> int:
    """Return the number of tokens that a model may use.

    Where its configuration names none, that is the default of the architecture in `mlx_lm`, if it
    has one. A recurrent model, which has no positions, is not bound by that default.
    """
    if length := getattr(model, CONTEXT_NOTE, None):
        return int(length)
    # Without the note of `load`, the configuration may have named what the arguments say.
    if is_recurrent and hasattr(model, CONTEXT_NOTE):
        return LONGEST_CONTEXT
    return int(find_argument(model, *CONTEXT_KEYS) or _DEFAULT_CONTEXT)


def _value(table: Any, key: str) -> Any:
    return table.get(key) if isinstance(table, dict) else getattr(table, key, None)
