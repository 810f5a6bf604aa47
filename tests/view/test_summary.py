"""Figures as text: status line, summary line, chat totals and the demo's last paragraph."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.types import Activity, RunStats, StopReason, Uploads
from mlxroute.view import ChatTotals, closing_paragraph, summary_line
from mlxroute.view.summary import status_line
from tests.support.scripted_answer import NO_STATS

_STATS = replace(
    NO_STATS,
    tokens=90,
    large_tokens=7,
    escalated=6,
    agreed=3,
    tokens_per_s=12.34,
    total_s=20.1,
    stall_s=8.2,
    requests=7,
    uploaded_tokens=2_345,
    uploaded_bytes=12_345,
)


def status(
    stats: RunStats,
    *,
    width: int,
    activity: Activity = Activity.WAIT,
    chat: Uploads | None = None,
) -> str:
    return status_line(
        stats,
        activity=activity,
        activity_s=1.23,
        prefill=(0, 0),
        routed=True,
        chat=chat,
        width=width,
    )


def test_the_status_line_shortens_itself_for_narrow_terminals() -> None:
    figures = "12 tok/s · 6.7% escalated · waited 8.2 s · uploaded 2,345 (12.3 kB)"
    assert status(_STATS, width=120) == f"{figures} · asking the large model 1.2 s"
    assert status(_STATS, width=90) == f"{figures} · asking large 1.2 s"
    assert status(_STATS, width=40) == "12 tok/s  6.7% escalated  asking 1.2 s"
    assert status(_STATS, width=12) == "asking 1.2 s"


def test_the_figures_do_not_move_when_the_activity_changes() -> None:
    for width in range(20, 130):
        waiting = status(_STATS, width=width)
        writing = status(_STATS, width=width, activity=Activity.DECODE)
        assert waiting.partition("asking")[0] == writing.partition("writing")[0]


@given(
    st.integers(0, 10**9), st.floats(0, 1e6), st.integers(1, 200), st.sampled_from(list(Activity))
)
def test_the_status_line_never_exceeds_the_width(
    count: int, seconds: float, width: int, activity: Activity
) -> None:
    stats = replace(
        _STATS,
        uploaded_tokens=count,
        stall_s=seconds,
        tokens_per_s=seconds,
        cost_estimate=seconds,
    )
    line = status_line(
        stats,
        activity=activity,
        activity_s=seconds,
        prefill=(count, count),
        routed=True,
        chat=Uploads(size_bytes=count, tokens=count),
        width=width,
    )
    assert len(line) <= width


def test_a_chat_without_routing_shows_no_escalation_rate() -> None:
    line = status_line(
        replace(_STATS, escalated=0, stall_s=0.0, uploaded_bytes=0),
        activity=Activity.DECODE,
        activity_s=0.0,
        prefill=(0, 0),
        routed=False,
        chat=Uploads(),
        width=80,
    )
    assert line == "12 tok/s · writing"


def test_the_summary_has_every_figure_and_only_faults_that_occurred() -> None:
    assert summary_line(_STATS) == (
        "90 tokens, 6 escalated (6.7%), agreement 50%, 12 tok/s, waited 8.2 s, "
        "uploaded 2,345 tokens (12.3 kB) in 7 requests"
    )
    faulty = replace(_STATS, unchecked=4, withheld=2, fallbacks=1, finish_reason=StopReason.LENGTH)
    assert summary_line(faulty) == (
        summary_line(_STATS) + ", 4 unchecked, 2 withheld, 1 failed call, ended by the token limit"
    )
    cached = replace(_STATS, large_cached_tokens=2_048)
    assert "uploaded 2,345 tokens (2,048 cached, 12.3 kB) in 7 requests" in summary_line(cached)
    local = replace(NO_STATS, tokens=1, tokens_per_s=9.97)
    assert summary_line(local) == "1 token, 0 escalated (0%), 10 tok/s"
    assert summary_line(replace(local, tokens_per_s=0.0)) == "1 token, 0 escalated (0%)"


def test_totals_add_up_over_answers() -> None:
    totals = ChatTotals()
    totals.add(_STATS)
    totals.add(replace(_STATS, unchecked=2, withheld=1))
    sent = Uploads(requests=15, size_bytes=24_690, tokens=4_698)
    assert totals.line(sent, cost=0.01234) == (
        "2 answers, 180 tokens, 12 escalated (6.7%), waited 16 s of 40 s, "
        "uploaded 4,698 tokens (24.7 kB) in 15 requests, cost ~0.0123, 2 unchecked, 1 withheld"
    )


def test_the_status_line_has_the_uploads_of_the_answer_and_of_the_chat() -> None:
    line = status(_STATS, width=140, chat=Uploads(requests=9, size_bytes=68_000, tokens=15_100))
    assert "uploaded 2,345 (12.3 kB) · chat total 15.1k (68.0 kB) · asking" in line


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0.0000123456, "cost ~0.0000123"),
        (0.0123456, "cost ~0.0123"),
        (0.5, "cost ~0.500"),
        (12.3456, "cost ~12.35"),
        (12345.678, "cost ~12,345.68"),
        (float("inf"), "cost ~inf"),
        (float("nan"), "cost ~nan"),
    ],
)
def test_a_cost_is_a_number_without_currency(amount: float, text: str) -> None:
    assert text in summary_line(replace(_STATS, cost_estimate=amount))
    assert text in status(replace(_STATS, cost_estimate=amount), width=200)
    assert "cost" not in summary_line(replace(_STATS, cost_estimate=None))


def test_withheld_positions_are_not_attributed_to_the_server() -> None:
    stats = replace(NO_STATS, tokens=9, unchecked=2, withheld=2)
    text = closing_paragraph(stats, small="tiny", large="huge", threshold=1.6)
    assert "did not answer" not in text
    assert "2 positions kept local by --never-send" in text


def test_the_closing_paragraph_has_the_answers_figures() -> None:
    text = closing_paragraph(_STATS, small="tiny", large="huge", threshold=1.6)
    assert "tiny wrote 83 of the 90 tokens" in text
    assert "huge was asked for one token wherever the small model's entropy passed 1.6 nats" in text
    assert "6 times, at 6.7% of the positions" in text
    assert (
        "8.2 s of 20 s went into waiting for it; uploaded 2,345 tokens (12.3 kB) in 7 requests"
        in text
    )
    assert "\n" not in text


def test_the_closing_paragraph_names_the_budget() -> None:
    text = closing_paragraph(
        _STATS, small="tiny", large="huge", threshold=1.6, allowance="7% of the tokens and 4 more"
    )
    assert "wherever the small model was least sure, within 7% of the tokens and 4 more: 6" in text
    assert "1.6 nats" not in text


def test_the_closing_paragraph_counts_positions_that_were_not_checked() -> None:
    failed = replace(NO_STATS, tokens=9, unchecked=2)
    text = closing_paragraph(failed, small="tiny", large="huge", threshold=1.6)
    assert "2 positions should have been checked with huge, which did not answer" in text
    not_escalated = closing_paragraph(
        replace(failed, unchecked=0), small="tiny", large="huge", threshold=1.6
    )
    assert "huge was not asked" in not_escalated
