"""The final hidden state, taken from the forward pass of decoding."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mlxroute.errors import UsageError


class HiddenStateTap:
    """Keeps the latest output of a model's final norm in each thread.

    `mlx_lm` models return logits only, so the norm gets a subclass that keeps what it returns.
    """

    def __init__(self, model: Any) -> None:
        norm = _find_final_norm(model)
        self._has_norm = norm is not None
        # Small models with KV caches of their own share the model, and may each have a thread.
        self._latest = threading.local()
        if norm is not None:
            _keep_outputs(norm, self._latest)

    def check(self) -> None:
        """Raise UsageError for an architecture whose final norm is unknown."""
        if not self._has_norm:
            raise UsageError(
                "cannot read the final hidden state: mlxroute does not know where this"
                " architecture keeps its final norm"
            )

    def last(self) -> Any:
        """Return the states of the thread's last pass, [B, n, D]; None before the first."""
        return getattr(self._latest, "states", None)


class ChosenRows:
    """Computes a model's logits at chosen positions only, which saves most of the memory.

    The output layer has far more values than any other, so the final norm gets a subclass that
    passes only the chosen positions on. Where an architecture keeps its final norm elsewhere, all
    logits are computed.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._indices: list[Any] = []
        norm = _find_final_norm(model)
        self._has_norm = norm is not None
        if norm is not None:
            _choose_rows(norm, self._indices)

    def logits(self, tokens: Any, indices: Any, *, cache: Any = None) -> Any:
        """Return the logits [N, V] at positions of tokens [B, T], given as indices into B * T.

        `cache` holds what precedes the tokens, nothing by default.
        """
        self._indices[:] = [indices] if self._has_norm else []
        try:
            logits = self._model(tokens, cache=cache)
        finally:
            self._indices.clear()
        rows = logits.reshape(-1, logits.shape[-1])
        return rows if self._has_norm else rows[indices]


def _choose_rows(norm: Any, indices: list[Any]) -> None:
    """Make calls of the module `norm` return the rows `indices[0]` as [1, N, D], if it is set."""

    def choose(output: Any) -> Any:
        return output.reshape(-1, output.shape[-1])[indices[0]][None] if indices else output

    _change_output(norm, choose)


def _keep_outputs(norm: Any, latest: threading.local) -> None:
    """Make every call of the module `norm` keep its result as `latest.states`."""

    def keep(output: Any) -> Any:
        latest.states = output
        return output

    _change_output(norm, keep)


def _change_output(module: Any, change: Callable[[Any], Any]) -> None:
    """Make every call of a module return what `change` makes of its output."""
    plain = type(module)

    def call(called: Any, hidden: Any) -> Any:
        return change(plain.__call__(called, hidden))

    module.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def _find_final_norm(model: Any) -> Any:
    for holder in (model, getattr(model, "language_model", None)):
        norm = getattr(getattr(holder, "model", None), "norm", None)
        if norm is not None:
            return norm
    return None
