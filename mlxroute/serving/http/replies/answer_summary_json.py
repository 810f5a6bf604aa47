"""The figures of a served answer, as replies carry them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from mlxroute.serving.http.model_names import ModelRole
from mlxroute.types import RunStats, StopReason

FINISH_REASONS = {
    StopReason.EOS: "stop",
    StopReason.STOP_STRING: "stop",
    StopReason.LENGTH: "length",
}
_FIGURES = (
    "tokens",
    "large_tokens",
    "escalated",
    "escalation_rate",
    "agreed",
    "agreement",
    "accepted",
    "unchecked",
    "withheld",
    "fallbacks",
    "calls",
    "uploaded_tokens",
    "uploaded_bytes",
    "cost_estimate",
)
_MAX_FAILURES = 4
_TIMES = ("ttft_s", "stall_s", "tokens_per_s", "total_s")


def summarize(
    all_stats: Sequence[RunStats],
    *,
    role: ModelRole,
    small: str,
    large: str | None,
) -> dict[str, Any]:
    """Return what was routed in the answers of a request, usually one.

    `large` is None if the large model could not be asked.
    """
    total = {name: _total(all_stats, name) for name in _FIGURES if name not in ("escalation_rate",)}
    tokens, escalated = total["tokens"], total["escalated"]
    total["escalation_rate"] = round(escalated / tokens, 6) if tokens else 0.0
    total["agreement"] = round(total["agreed"] / escalated, 6) if escalated else None
    summary: dict[str, Any] = {"role": role, "small": small, "large": large, **total}
    if len(all_stats) == 1:
        summary |= {name: round(getattr(all_stats[0], name), 6) for name in _TIMES}
        summary["mode"] = all_stats[0].mode
    failures: Counter[tuple[str, str]] = Counter()
    for failure in (failure for stats in all_stats for failure in stats.failures):
        failures[failure.kind, failure.reason] += failure.count
    if failures:
        summary["failures"] = [
            {"kind": kind, "reason": reason, "positions": count}
            for (kind, reason), count in islice(failures.items(), _MAX_FAILURES)
        ]
    return summary


def _total(all_stats: Sequence[RunStats], name: str) -> Any:
    values = [getattr(stats, name) for stats in all_stats]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def usage(
    all_stats: Sequence[RunStats], prompt_tokens: int, summary: dict[str, Any]
) -> dict[str, Any]:
    """Return the `usage` of a reply."""
    completion_tokens = sum(stats.tokens for stats in all_stats)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(stats.cached_prompt_tokens for stats in all_stats),
        },
        "mlxroute": summary,
    }
