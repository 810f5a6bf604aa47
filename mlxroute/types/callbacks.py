"""Callbacks for progress and notices."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives how much of a long task is done; `total` is None while unknown."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


class Notify(Protocol):
    """Receives one line that the user should read."""

    def __call__(self, line: str) -> None: ...


def no_progress(label: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def no_notice(line: str) -> None:
    """Ignore a notice."""
