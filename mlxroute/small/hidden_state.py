"""The final hidden state, taken from the forward pass that runs anyway."""

from __future__ import annotations

from typing import Any

from mlxroute.errors import UsageError


class HiddenStateTap:
    """Remembers what a model's final norm last returned."""

    def __init__(self, model: Any) -> None:
        self._seen: list[Any] = []
        norm = _final_norm(model)
        self._found = norm is not None
        if norm is None:
            return
        seen = self._seen
        plain = type(norm)

        def call(module: Any, hidden: Any) -> Any:
            output = plain.__call__(module, hidden)
            seen[:] = [output]
            return output

        norm.__class__ = type(plain.__name__, (plain,), {"__call__": call})

    def check(self) -> None:
        """Raise UsageError for an architecture whose final norm is not known."""
        if not self._found:
            raise UsageError("this architecture's final hidden state is not known to mlxroute")

    def last(self) -> Any:
        """The states of the last forward pass, [B, n, D], or None."""
        return self._seen[0] if self._seen else None


def _final_norm(model: Any) -> Any:
    for holder in (model, getattr(model, "language_model", None)):
        norm = getattr(getattr(holder, "model", None), "norm", None)
        if norm is not None:
            return norm
    return None
