"""What a probe found out about an endpoint, and the file that remembers it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class CapabilityCheck:
    """The outcome of one question; `passed` is None where no answer could be known."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class RejectedDialect:
    """A dialect that was not chosen, and why."""

    dialect: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an endpoint is best asked. Latencies in seconds, of calls for one token.

    `same` says, by the fingerprint of a small vocabulary, whether the large one equals it.
    """

    base_url: str
    model: str | None
    dialect: str
    rung: int
    checks: tuple[CapabilityCheck, ...]
    refusals: tuple[RejectedDialect, ...]
    tokens: str | None
    context_length: int | None
    latency_p50_s: float
    latency_p95_s: float
    calls: int
    same: tuple[tuple[str, bool], ...] = ()

    def knows(self, small: str) -> bool | None:
        """Whether the vocabulary with this fingerprint is the large model's; None if not known."""
        return dict(self.same).get(small)

    def knowing(self, small: str, same: bool) -> Self:
        """The verdict with that knowledge."""
        return replace(self, same=tuple(sorted({**dict(self.same), small: same}.items())))


class VerdictFile:
    """Verdicts by endpoint and model, in one JSON file. What cannot be read is probed again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, base_url: str, model: str | None) -> Verdict | None:
        """The remembered verdict, if there is one."""
        return _verdict(self._all().get(_key(base_url, model)))

    def save(self, verdict: Verdict, *, named: str | None) -> None:
        """Remember a verdict for the model the user `named`; a full disk is not worth a word."""
        self._write(self._all() | {_key(verdict.base_url, named): asdict(verdict)})

    def forget(self, base_url: str, model: str | None) -> None:
        """Drop a verdict that does not fit any more."""
        verdicts = self._all()
        if verdicts.pop(_key(base_url, model), None) is not None:
            self._write(verdicts)

    def _all(self) -> dict[str, Any]:
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        fits = isinstance(value, dict) and value.get("format") == _FORMAT
        verdicts = value.get("verdicts") if fits else None
        return verdicts if isinstance(verdicts, dict) else {}

    def _write(self, verdicts: Mapping[str, Any]) -> None:
        text = json.dumps({"format": _FORMAT, "verdicts": verdicts}, indent=1)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(name).replace(self._path)


def _key(base_url: str, model: str | None) -> str:
    return f"{base_url} {model or ''}"


def _verdict(value: object) -> Verdict | None:
    if not isinstance(value, dict):
        return None
    try:
        verdict = Verdict(
            **{
                **value,
                "checks": tuple(CapabilityCheck(**check) for check in value["checks"]),
                "refusals": tuple(RejectedDialect(**refusal) for refusal in value["refusals"]),
                "same": tuple((small, same) for small, same in value["same"]),
            }
        )
    except (TypeError, KeyError, ValueError):
        return None
    return verdict if _is_sound(verdict) else None


def _is_sound(verdict: Verdict) -> bool:
    """Whether every value has its type; JSON has numbers where Python has int and float."""
    texts = [verdict.base_url, verdict.dialect]
    texts += [text for text in (verdict.model, verdict.tokens) if text is not None]
    texts += [text for check in verdict.checks for text in (check.name, check.detail)]
    texts += [text for each in verdict.refusals for text in (each.dialect, each.reason)]
    texts += [small for small, _ in verdict.same]
    counts = [verdict.rung, verdict.calls, verdict.context_length or 0]
    times_s = [verdict.latency_p50_s, verdict.latency_p95_s]
    truths = [same for _, same in verdict.same]
    passed = [check.passed for check in verdict.checks if check.passed is not None]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(count) is int for count in counts)
        and all(type(time_s) in (int, float) for time_s in times_s)
        and all(isinstance(truth, bool) for truth in (*truths, *passed))
    )
