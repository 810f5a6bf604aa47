"""Warnings about answers: those that every session has, and each kind only once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final, Protocol

from mlxroute.safe_text import printable
from mlxroute.types import RunStats
from mlxroute.view.figures import format_count

_MAX_NAMES: Final = 3


class _NeutralisingLarge(Protocol):
    @property
    def model_name(self) -> str: ...

    @property
    def neutralised(self) -> tuple[str, ...]: ...


class AnswerWarnings:
    """The kinds of warnings that a session has given. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: set[str] = set()

    def new_lines(self, kinds: Mapping[str, str]) -> list[str]:
        """Return the warnings, by kind, of which there has been none of the kind so far."""
        with self._lock:
            lines = [line for kind, line in kinds.items() if kind not in self._given]
            self._given |= kinds.keys()
        return lines

    def clear(self) -> None:
        """Give warnings of all kinds again."""
        with self._lock:
            self._given.clear()


def common_warnings(
    stats: RunStats | None,
    *,
    large: _NeutralisingLarge | None,
    small_name: str,
    show_names: bool,
) -> dict[str, str]:
    """Return the warnings about an answer, by kind.

    Args:
        stats: Its statistics; None for an answer of the large model alone.
        large: The large model; None without one.
        small_name: The small model's name.
        show_names: Whether names of control tokens, which are text of the conversation, are shown.
            If not, their number is.
    """
    warnings = {}
    if large is not None and large.neutralised:
        names = format_count(len(large.neutralised), "name")
        if show_names:
            names = ", ".join(map(printable, large.neutralised[:_MAX_NAMES]))
        warnings["neutralised"] = (
            f"{large.model_name} would read {names} as control tokens, so it gets them with a space"
            " inside"
        )
    if stats is not None and stats.held:
        warnings["held"] = (
            f"the KV cache of {small_name} cannot be rolled back at every length, so decoding"
            " sometimes pauses during calls"
        )
    if stats is not None and stats.advice:
        warnings["advice"] = stats.advice
    return warnings
