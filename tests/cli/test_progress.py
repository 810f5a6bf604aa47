"""Progress of long runs: on a terminal, and where stderr is not one."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable

import pytest
from rich.console import Console, RenderHook
from rich.live import Live

from mlxroute.cli.progress import ByteProgress, count_progress
from mlxroute.cli.terminal import show_status
from mlxroute.terminal_modes import TERMINAL
from mlxroute.view import LiveView
from tests.support.recording_terminal import Terminal
from tests.support.scripted_answer import ScriptedAnswer


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


def _show_answer(console: Console) -> None:
    LiveView(console, heat=False, threshold=1.0).show(ScriptedAnswer(["text"]))


def _show_bars(console: Console) -> None:
    with count_progress(console) as progress:
        progress("questions", 1, 2)


def _show_bytes(console: Console) -> None:
    with ByteProgress(console) as progress:
        progress.progress("model", 1, 2)


def _show_status(console: Console) -> None:
    with show_status(console, "measuring"):
        pass


@pytest.mark.parametrize("show", [_show_answer, _show_bars, _show_bytes, _show_status])
def test_ctrl_z_while_a_display_is_removed_does_not_leave_another(
    show: Callable[[Console], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[Live] = []
    remove = Live.stop

    def remove_and_stop(live: Live) -> None:
        remove(live)
        # As the signal's handler does; later ones come from removing the display for the stop.
        if not stops:
            stops.append(live)
            TERMINAL.stop_process()

    monkeypatch.setattr(Live, "stop", remove_and_stop)
    monkeypatch.setattr("mlxroute.terminal_modes.os.kill", lambda *_: None)
    terminal = Terminal(width=60)
    show(terminal.console)
    assert stops
    assert terminal.cursor_is_shown
    assert terminal.raw.count("\x1b[?25l") == 1


@pytest.mark.parametrize("show", [_show_answer, _show_bars, _show_bytes, _show_status])
def test_ctrl_c_while_a_display_starts_is_an_interrupt_and_removes_it(
    show: Callable[[Console], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Console.push_render_hook

    def interrupt_and_push(console: Console, hook: RenderHook) -> None:
        # Here the display is half started: it counts as such, and its hook is missing.
        signal.raise_signal(signal.SIGINT)
        push(console, hook)

    monkeypatch.setattr(Console, "push_render_hook", interrupt_and_push)
    terminal = Terminal(width=60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            show(terminal.console)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert terminal.cursor_is_shown
