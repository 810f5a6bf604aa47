"""The verdict of probing an endpoint, and the JSON file that remembers verdicts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from mlxroute.errors import UsageError
from mlxroute.replace_file import replace_file
from mlxroute.untrusted_text import MalformedText, TextFile, parse_json

_FORMAT: Final = 1
_MAX_BYTES: Final = 16 * 2**20
APPROXIMATE_RUNG: Final = 5
"""The rung whose tokens are those of a model that was asked to go on with an answer."""
# In the file, begins the name of a check that holds the difference of a compared vocabulary.
_DIFFERENCE: Final = "vocabulary "


@dataclass(frozen=True, slots=True)
class CapabilityCheck:
    """The outcome of one check of a dialect; `passed` is None if it was inconclusive."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class RejectedDialect:
    """The name of a dialect that the server failed, and why."""

    dialect: str
    reason: str


@dataclass(frozen=True, slots=True)
class ComparedVocabulary:
    """How the vocabulary of a small model compares with the large model's.

    Args:
        fingerprint: The fingerprint of the small model's vocabulary.
        is_shared: Whether the two are equal.
        difference: An example of how they differ; empty (default) if none is known.
    """

    fingerprint: str
    is_shared: bool
    difference: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of probing one endpoint.

    Args:
        base_url: The address of the endpoint.
        model: The name of the model that was probed; None if neither the user nor the server named
            one.
        dialect: The name of the dialect.
        rung: The exactness of the dialect, from 1 (best) to 5.
        checks: The outcomes of its checks.
        rejected: The dialects that were rejected before it.
        token_source: The name of the source of token ids; None without one.
        context_length: The large model's context, in tokens; None if unknown.
        latency_p50_s: Median latency of probe requests for one token, in seconds.
        latency_p95_s: 95th percentile of the same.
        requests: Number of probe requests.
        vocabularies: The vocabularies of small models that were compared with the large model's,
            in the order of their fingerprints.
    """

    base_url: str
    model: str | None
    dialect: str
    rung: int
    checks: tuple[CapabilityCheck, ...]
    rejected: tuple[RejectedDialect, ...]
    token_source: str | None
    context_length: int | None
    latency_p50_s: float
    latency_p95_s: float
    requests: int
    vocabularies: tuple[ComparedVocabulary, ...] = ()

    @property
    def is_approximate(self) -> bool:
        """Whether tokens may differ from those of the large model's own greedy answer."""
        return self.rung >= APPROXIMATE_RUNG

    def compared(self, fingerprint: str) -> ComparedVocabulary | None:
        """Return the comparison of the vocabulary with this fingerprint; None if there is none."""
        return next((item for item in self.vocabularies if item.fingerprint == fingerprint), None)

    def with_vocabulary(self, vocabulary: ComparedVocabulary) -> Self:
        """Return a copy with this comparison, in place of an earlier one."""
        others = (v for v in self.vocabularies if v.fingerprint != vocabulary.fingerprint)
        vocabularies = sorted((*others, vocabulary), key=lambda item: item.fingerprint)
        return replace(self, vocabularies=tuple(vocabularies))


class VerdictFile:
    """A JSON file with one verdict per endpoint and model. A damaged entry counts as missing."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)

    def load(self, base_url: str, model: str | None) -> Verdict | None:
        """Return the verdict for an endpoint; None if there is none. `model` is as in `save`."""
        return _verdict_from_json(self._read_entries().get(_key(base_url, model)))

    def save(self, verdict: Verdict, *, model: str | None) -> bool:
        """Store a verdict; `model` is the name the user gave, None if they gave none.

        Returns False if the file cannot be written: the server is then probed again next time.
        """
        key = _key(verdict.base_url, model)
        return self._write_entries(self._read_entries() | {key: _verdict_to_json(verdict)})

    def forget(self, base_url: str, model: str | None) -> None:
        """Remove the verdict for an endpoint, if there is one. `model` is as in `save`."""
        entries = self._read_entries()
        if entries.pop(_key(base_url, model), None) is not None:
            self._write_entries(entries)

    def _read_entries(self) -> dict[str, Any]:
        file = TextFile(self._path, "the file of verdicts", max_bytes=_MAX_BYTES)
        try:
            content = parse_json(file.read(), strict=False)
        except (UsageError, MalformedText):
            return {}
        is_readable = isinstance(content, dict) and content.get("format") == _FORMAT
        entries = content.get("verdicts") if is_readable else None
        return entries if isinstance(entries, dict) else {}

    def _write_entries(self, entries: Mapping[str, Any]) -> bool:
        text = json.dumps({"format": _FORMAT, "verdicts": entries}, indent=1)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, text.encode(), mode=0o600)
            return True
        return False


def _key(base_url: str, model: str | None) -> str:
    return f"{base_url} {model or ''}"


def _verdict_to_json(verdict: Verdict) -> dict[str, object]:
    checks = verdict.checks + tuple(
        CapabilityCheck(_DIFFERENCE + item.fingerprint, item.is_shared, item.difference)
        for item in verdict.vocabularies
        if item.difference
    )
    return {
        "base_url": verdict.base_url,
        "model": verdict.model,
        "dialect": verdict.dialect,
        "rung": verdict.rung,
        "checks": [
            {"name": check.name, "passed": check.passed, "detail": check.detail} for check in checks
        ],
        "refusals": [
            {"dialect": rejected.dialect, "reason": rejected.reason}
            for rejected in verdict.rejected
        ],
        "tokens": verdict.token_source,
        "context_length": verdict.context_length,
        "latency_p50_s": verdict.latency_p50_s,
        "latency_p95_s": verdict.latency_p95_s,
        "calls": verdict.requests,
        "same": [[item.fingerprint, item.is_shared] for item in verdict.vocabularies],
    }


def _verdict_from_json(value: object) -> Verdict | None:
    """Return the verdict; None unless it has exactly the written keys and their types."""
    try:
        verdict = _parsed_verdict(value)
    except (TypeError, ValueError):
        return None
    return verdict if _has_valid_types(verdict) else None


def _parsed_verdict(value: object) -> Verdict:
    entry = _object_with_keys(
        value,
        *("base_url", "model", "dialect", "rung", "checks", "refusals", "tokens"),
        *("context_length", "latency_p50_s", "latency_p95_s", "calls", "same"),
    )
    checks = []
    differences = {}
    for item in entry["checks"]:
        check = CapabilityCheck(**_object_with_keys(item, "name", "passed", "detail"))
        if str(check.name).startswith(_DIFFERENCE):
            differences[check.name] = check.detail
        else:
            checks.append(check)
    refusals = [_object_with_keys(item, "dialect", "reason") for item in entry["refusals"]]
    return Verdict(
        base_url=entry["base_url"],
        model=entry["model"],
        dialect=entry["dialect"],
        rung=entry["rung"],
        checks=tuple(checks),
        rejected=tuple(RejectedDialect(r["dialect"], r["reason"]) for r in refusals),
        token_source=entry["tokens"],
        context_length=entry["context_length"],
        latency_p50_s=entry["latency_p50_s"],
        latency_p95_s=entry["latency_p95_s"],
        requests=entry["calls"],
        vocabularies=tuple(
            ComparedVocabulary(name, is_shared, differences.get(f"{_DIFFERENCE}{name}", ""))
            for name, is_shared in entry["same"]
        ),
    )


def _object_with_keys(value: object, *keys: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise ValueError(f"not a JSON object with the keys {', '.join(keys)}")
    return value


def _has_valid_types(verdict: Verdict) -> bool:
    texts = [verdict.base_url, verdict.dialect]
    texts += [text for text in (verdict.model, verdict.token_source) if text is not None]
    texts += [text for check in verdict.checks for text in (check.name, check.detail)]
    texts += [text for item in verdict.rejected for text in (item.dialect, item.reason)]
    texts += [text for item in verdict.vocabularies for text in (item.fingerprint, item.difference)]
    counts = [verdict.rung, verdict.requests, verdict.context_length or 0]
    # JSON does not keep the difference between 1 and 1.0.
    times_s = [verdict.latency_p50_s, verdict.latency_p95_s]
    flags = [item.is_shared for item in verdict.vocabularies]
    flags += [check.passed for check in verdict.checks if check.passed is not None]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(count) is int for count in counts)
        and all(type(time_s) in (int, float) for time_s in times_s)
        and all(isinstance(flag, bool) for flag in flags)
    )
