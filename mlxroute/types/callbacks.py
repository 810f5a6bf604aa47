"""Callbacks for progress and notices."""

from __future__ import annotations

from typing import Protocol

from mlxroute.types.escalating import CallFailure


class Progress(Protocol):
    """Receives how much of a long task is done; `total` is None while unknown."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


class Notify(Protocol):
    """Receives one line that the user should read."""

    def __call__(self, line: str) -> None: ...


class OnFailure(Protocol):
    """Receives the first failure of each kind in an answer, when its position is committed."""

    def __call__(self, failure: CallFailure, /) -> None: ...


def ignore_failure(failure: CallFailure) -> None:
    """Ignore a failure."""


def no_progress(label: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def no_notice(line: str) -> None:
    """Ignore a notice."""
