"""Progress of long runs where stderr is not a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mlxroute.cli.progress import count_progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that the progress sees, as a list of one."""
    seconds = [0.0]
    monkeypatch.setattr("mlxroute.cli.progress.time.monotonic", lambda: seconds[0])
    return seconds


def test_a_line_a_minute_estimates_the_rest(clock: list[float]) -> None:
    out = io.StringIO()
    with count_progress(Console(file=out)) as progress:
        for done in range(11):
            progress("questions", done, 10)
            clock[0] += 40.0
    assert out.getvalue().splitlines() == [
        "questions: 2 of 10, about 5 min left",
        "questions: 4 of 10, about 4 min left",
        "questions: 6 of 10, about 3 min left",
        "questions: 8 of 10, about 1 min left",
    ]


def test_the_time_of_an_earlier_stage_is_not_in_the_estimate(clock: list[float]) -> None:
    out = io.StringIO()
    with count_progress(Console(file=out)) as progress:
        progress("answers", 0, 500)
        clock[0] += 3000.0
        progress("training steps", 0, 100)
        clock[0] += 61.0
        progress("training steps", 10, 100)
    assert out.getvalue().splitlines() == ["training steps: 10 of 100, about 9 min left"]
