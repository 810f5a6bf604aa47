"""Figures of answers as text: status line, summary line and chat totals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from mlxroute.types import Activity, CallFailure, Mode, RunStats, StopReason, Uploads
from mlxroute.view.figures import (
    describe_answer_uploads,
    describe_uploads,
    format_count,
    format_number,
    format_percent,
    format_seconds,
    format_size,
)

_ENDS = {
    StopReason.LENGTH: "ended by the token limit",
    StopReason.CANCELLED: "stopped before its end",
}


def _cost(amount: float) -> str:
    """Return an amount without currency: three significant digits, at least two decimals."""
    if not math.isfinite(amount):
        return f"cost ~{amount}"
    decimals = 2 if amount <= 0 else max(2, 2 - math.floor(math.log10(amount)))
    return f"cost ~{amount:,.{decimals}f}"


def _short_count(number: int) -> str:
    """Return a count, shortened to thousands (k) or millions (M) from 10,000 on."""
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e3:.1f}k" if number < 1_000_000 else f"{number / 1e6:.1f}M"


def _describe_activity(
    activity: Activity, *, activity_s: float, prefill: tuple[int, int]
) -> tuple[str, str, str]:
    """Return what the engine is doing, in a long, a shorter and the shortest form."""
    match activity:
        case Activity.PREFILL:
            position = f"prompt {prefill[0]:,}/{prefill[1]:,}"
            return f"reading {position}", f"reading {position}", position
        case Activity.WAIT:
            elapsed = format_seconds(activity_s)
            return (
                f"asking the large model {elapsed}",
                f"asking large {elapsed}",
                f"asking {elapsed}",
            )
        case Activity.DECODE:
            return "writing", "writing", "writing"
        case Activity.DONE:
            return "done", "done", "done"


# Cells that each form may take without moving the figures.
_ACTIVITY_WIDTHS = tuple(
    map(len, _describe_activity(Activity.WAIT, activity_s=9.9, prefill=(0, 0)))
)


def status_line(
    stats: RunStats,
    *,
    activity: Activity,
    activity_s: float,
    prefill: tuple[int, int],
    routed: bool,
    chat: Uploads | None,
    width: int,
) -> str:
    """Return the figures so far and what the engine is doing.

    Figures keep their place when the activity changes.

    Args:
        stats: The figures.
        activity: What the engine is doing.
        activity_s: Seconds since the activity began.
        prefill: Number of processed prompt tokens, and of all prompt tokens.
        routed: Whether positions can be escalated.
        chat: Uploads of the whole chat; None outside a chat.
        width: Maximum length in cells.
    """
    figures = [f"{format_number(stats.tokens_per_s)} tok/s"] if stats.tokens else []
    if stats.tokens and routed:
        figures.append(f"{format_percent(stats.escalation_rate)} escalated")
        if stats.mode is not Mode.WAIT:
            figures.append(str(stats.mode))
    if stats.stall_s > 0:
        figures.append(f"waited {format_seconds(stats.stall_s)}")
    if stats.uploaded_bytes:
        sent = f"{_short_count(stats.uploaded_tokens)} ({format_size(stats.uploaded_bytes)})"
        figures.append(f"uploaded {sent}")
    if chat is not None and chat.size_bytes:
        figures.append(f"chat total {_short_count(chat.tokens)} ({format_size(chat.size_bytes)})")
    if stats.cost_estimate:
        figures.append(_cost(stats.cost_estimate))
    forms = _describe_activity(activity, activity_s=activity_s, prefill=prefill)
    separators = (" · ", " · ", "  ")
    for separator, form, form_width in zip(separators, forms, _ACTIVITY_WIDTHS, strict=True):
        line = separator.join([*figures, form.ljust(form_width)])
        if len(line) <= width:
            return line.rstrip()
    while figures and len(line) > width:
        figures.pop()
        line = separator.join([*figures, form.ljust(form_width)])
    return line[:width].rstrip()


def summary_line(stats: RunStats) -> str:
    """Return one line about an answer that has ended or was stopped."""
    parts = [
        format_count(stats.tokens, "token"),
        f"{stats.escalated:,} escalated ({format_percent(stats.escalation_rate)})",
    ]
    if stats.agreement is not None:
        parts.append(f"agreement {format_percent(stats.agreement)}")
    # One token has no speed.
    if stats.tokens_per_s:
        parts.append(f"{format_number(stats.tokens_per_s)} tok/s")
    if stats.stall_s > 0:
        parts.append(f"waited {format_seconds(stats.stall_s)}")
    if stats.uploaded_bytes:
        parts.append(describe_answer_uploads(stats))
    if stats.cost_estimate:
        parts.append(_cost(stats.cost_estimate))
    if stats.unchecked:
        parts.append(f"{stats.unchecked:,} unchecked")
    if stats.withheld:
        parts.append(f"{stats.withheld:,} withheld")
    parts += _describe_failures(stats)
    if (end := _ENDS.get(stats.finish_reason)) is not None:
        parts.append(end)
    if stats.plan:
        parts.append(stats.plan)
    return ", ".join(parts)


def _describe_failures(stats: RunStats) -> list[str]:
    """Return how many calls failed, and how many were not made, with the kinds of reasons."""
    parts = []
    if stats.fallbacks:
        kinds = ", ".join(failure.kind for failure in stats.failures if failure.was_called)
        parts.append(
            format_count(stats.fallbacks, "failed call") + (f" ({kinds})" if kinds else "")
        )
    not_made = [failure for failure in stats.failures if not failure.was_called]
    if not_made:
        count = sum(failure.count for failure in not_made)
        kinds = ", ".join(failure.kind for failure in not_made)
        parts.append(f"{format_count(count, 'call')} not made ({kinds})")
    return parts


@dataclass(slots=True)
class ChatTotals:
    """Sums of the figures of a chat's answers."""

    answers: int = 0
    tokens: int = 0
    escalated: int = 0
    unchecked: int = 0
    withheld: int = 0
    stall_s: float = 0.0
    total_s: float = 0.0
    # The last failure of each kind, with the count of all.
    failures: dict[str, CallFailure] = field(default_factory=dict)

    def add(self, stats: RunStats) -> None:
        """Add the figures of an answer."""
        self.answers += 1
        self.tokens += stats.tokens
        self.escalated += stats.escalated
        self.unchecked += stats.unchecked
        self.stall_s += stats.stall_s
        self.withheld += stats.withheld
        self.total_s += stats.total_s
        for failure in stats.failures:
            earlier = self.failures.get(failure.kind)
            count = failure.count + (0 if earlier is None else earlier.count)
            self.failures[failure.kind] = replace(failure, count=count)

    def failure_lines(self) -> list[str]:
        """Return a line for each kind of failure: its count, and the last reason."""
        return [
            f"{format_count(failure.count, 'position')} unchecked, {failure.kind}: {failure.reason}"
            for failure in self.failures.values()
        ]

    def line(self, uploads: Uploads, *, cost: float | None) -> str:
        """Return one line about all answers, with the uploads of the chat and their cost.

        `uploads` also includes those of the probe and of cancelled calls.
        """
        rate = self.escalated / self.tokens if self.tokens else 0.0
        parts = [
            format_count(self.answers, "answer"),
            format_count(self.tokens, "token"),
            f"{self.escalated:,} escalated ({format_percent(rate)})",
        ]
        if self.stall_s > 0:
            parts.append(f"waited {format_seconds(self.stall_s)} of {format_seconds(self.total_s)}")
        if uploads.size_bytes:
            parts.append(
                describe_uploads(
                    tokens=uploads.tokens,
                    cached=uploads.cached_tokens,
                    size_bytes=uploads.size_bytes,
                    requests=uploads.requests,
                )
            )
        if cost:
            parts.append(_cost(cost))
        if self.unchecked:
            parts.append(f"{self.unchecked:,} unchecked")
        if self.withheld:
            parts.append(f"{self.withheld:,} withheld")
        return ", ".join(parts)
