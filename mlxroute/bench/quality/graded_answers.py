"""Graded answers of a run, saved so that an interrupted run continues where it stopped."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxroute.recorded.record_file import append_records, read_records


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One graded answer; the `scores` of its positions restore the budget's state after it.

    Of its `seconds`, `calls_s` are those of calls. `is_cut_off` tells whether it reached the
    maximum length without an end. Both are None if an earlier version saved it.
    """

    question: str
    text: str
    strict: bool | None
    lenient: bool | None
    tokens: int
    escalated: int
    agreed: int
    unchecked: int
    calls: int
    uploaded_tokens: int
    seconds: float
    calls_s: float | None
    is_cut_off: bool | None
    scores: tuple[float, ...]


class QualityResults:
    """A file of graded answers, from which an interrupted run continues. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._rows = dict(read_records(path, _keyed_row))

    def find(self, key: str) -> QualityRow | None:
        """Return the answer saved under a key; None if there is none."""
        return self._rows.get(key)

    def add(self, key: str, row: QualityRow) -> None:
        """Save an answer."""
        with self._lock:
            self._rows[key] = row
            append_records(self._path, [{"key": key, "row": _row_to_json(row)}])


def _row_to_json(row: QualityRow) -> dict[str, Any]:
    """Return a row as in the file; the keys are part of the file format."""
    return {
        "question": row.question,
        "text": row.text,
        "strict": row.strict,
        "lenient": row.lenient,
        "tokens": row.tokens,
        "escalated": row.escalated,
        "agreed": row.agreed,
        "unchecked": row.unchecked,
        "calls": row.calls,
        "uploaded_tokens": row.uploaded_tokens,
        "seconds": row.seconds,
        "calls_s": row.calls_s,
        "cut_off": row.is_cut_off,
        "scores": row.scores,
    }


def _keyed_row(item: Any) -> tuple[str, QualityRow]:
    return str(item["key"]), _row_from_json(item["row"])


def _row_from_json(item: Mapping[str, Any]) -> QualityRow:
    return QualityRow(
        question=item["question"],
        text=item["text"],
        strict=item["strict"],
        lenient=item["lenient"],
        tokens=item["tokens"],
        escalated=item["escalated"],
        agreed=item["agreed"],
        unchecked=item["unchecked"],
        calls=item["calls"],
        uploaded_tokens=item["uploaded_tokens"],
        seconds=item["seconds"],
        calls_s=item.get("calls_s"),
        is_cut_off=item.get("cut_off"),
        scores=tuple(item["scores"]),
    )
