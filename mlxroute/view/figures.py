"""Numbers, durations, shares, sizes and uploads as text."""

from __future__ import annotations

from mlxroute.types import RunStats


def format_number(value: float) -> str:
    """Return a non-negative number with one decimal below 10 and with none above."""
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def format_seconds(value: float) -> str:
    """Return a duration, as "8.1 s"."""
    return f"{format_number(value)} s"


def format_percent(fraction: float) -> str:
    """Return a percentage, with a decimal below 10 % and above 99 %."""
    if fraction in (0.0, 1.0):
        return f"{fraction:.0%}"
    return f"{fraction:.1%}" if fraction < 0.1 or fraction > 0.99 else f"{fraction:.0%}"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an "s" in the plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_size(size_bytes: int) -> str:
    """Return a size in bytes, kB, MB or GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return format_count(size_bytes, "byte")


def describe_uploads(*, tokens: int, cached: int, size_bytes: int, requests: int) -> str:
    """Return a clause about what was sent; `cached` tokens came from the server's cache."""
    details = [f"{cached:,} cached"] * bool(cached) + [format_size(size_bytes)]
    sent = f"{format_count(tokens, 'token')} ({', '.join(details)})"
    return f"uploaded {sent} in {format_count(requests, 'request')}"


def describe_answer_uploads(stats: RunStats) -> str:
    """Return a clause about what was sent for an answer."""
    return describe_uploads(
        tokens=stats.uploaded_tokens,
        cached=stats.large_cached_tokens,
        size_bytes=stats.uploaded_bytes,
        requests=stats.requests,
    )
