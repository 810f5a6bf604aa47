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
# Begins the name of a check that compared a small model's vocabulary, before its fingerprint.
_COMPARISON: Final = "vocabulary "


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
        shared_vocabularies: Pairs of the fingerprint of a small model's vocabulary and whether it
            equals the large model's.
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
    shared_vocabularies: tuple[tuple[str, bool], ...] = ()

    @property
    def is_approximate(self) -> bool:
        """Whether tokens may differ from those of the large model's own greedy answer."""
        return self.rung >= APPROXIMATE_RUNG

    def is_shared(self, fingerprint: str) -> bool | None:
        """Return whether the vocabulary is the large model's; None if they were not compared."""
        return dict(self.shared_vocabularies).get(fingerprint)

    def difference(self, fingerprint: str) -> str:
        """Return an example of how a vocabulary differs from the large model's; empty if none."""
        name = _COMPARISON + fingerprint
        return next((check.detail for check in self.checks if check.name == name), "")

    def with_vocabulary(self, fingerprint: str, *, shared: bool, difference: str = "") -> Self:
        """Return a copy that also holds this result of a comparison, with an example."""
        vocabularies = {**dict(self.shared_vocabularies), fingerprint: shared}
        name = _COMPARISON + fingerprint
        checks = tuple(check for check in self.checks if check.name != name)
        if difference:
            checks += (CapabilityCheck(name, shared, difference),)
        return replace(self, shared_vocabularies=tuple(sorted(vocabularies.items())), checks=checks)


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
    return {
        "base_url": verdict.base_url,
        "model": verdict.model,
        "dialect": verdict.dialect,
        "rung": verdict.rung,
        "checks": [
            {"name": check.name, "passed": check.passed, "detail": check.detail}
            for check in verdict.checks
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
        "same": [list(pair) for pair in verdict.shared_vocabularies],
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
    checks = [_object_with_keys(item, "name", "passed", "detail") for item in entry["checks"]]
    refusals = [_object_with_keys(item, "dialect", "reason") for item in entry["refusals"]]
    return Verdict(
        base_url=entry["base_url"],
        model=entry["model"],
        dialect=entry["dialect"],
        rung=entry["rung"],
        checks=tuple(CapabilityCheck(c["name"], c["passed"], c["detail"]) for c in checks),
        rejected=tuple(RejectedDialect(r["dialect"], r["reason"]) for r in refusals),
        token_source=entry["tokens"],
        context_length=entry["context_length"],
        latency_p50_s=entry["latency_p50_s"],
        latency_p95_s=entry["latency_p95_s"],
        requests=entry["calls"],
        shared_vocabularies=tuple((fingerprint, shared) for fingerprint, shared in entry["same"]),
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
    texts += [fingerprint for fingerprint, _ in verdict.shared_vocabularies]
    counts = [verdict.rung, verdict.requests, verdict.context_length or 0]
    # JSON does not keep the difference between 1 and 1.0.
    times_s = [verdict.latency_p50_s, verdict.latency_p95_s]
    flags = [shared for _, shared in verdict.shared_vocabularies]
    flags += [check.passed for check in verdict.checks if check.passed is not None]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(count) is int for count in counts)
        and all(type(time_s) in (int, float) for time_s in times_s)
        and all(isinstance(flag, bool) for flag in flags)
    )
