"""The start of a batch at a time that the machine's speed does not decide."""

from __future__ import annotations

import time

import pytest

from mlxroute.serving import AnswerScheduler
from mlxroute.serving.small_client import Feed, SmallClient
from mlxroute.types import Signals

_DEADLINE_S = 60.0


def start_batch_of(
    count: int, scheduler: AnswerScheduler, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Hold decoding until `count` answers wait for a step that can be one batch.

    Without this a slow prompt makes the others decode without it, and they may end before. Call it
    before the answers are submitted. The returned list gets the number of rows of each step of a
    batch.
    """
    device = scheduler._device
    is_step_due, must_wait = device._is_step_due, device._prefill_must_wait
    step_batch = device._step_batch
    row_counts: list[int] = []
    end_s = time.monotonic() + _DEADLINE_S
    has_started = False

    def is_due() -> bool:
        nonlocal has_started
        if not has_started:
            feeds = [r for r in device._requests.values() if isinstance(r, Feed)]
            are_all = len(feeds) >= count or time.monotonic() > end_s
            # Exact answers feed the end of their prompts alone.
            has_started = are_all and not any(feed.unbatched for feed in feeds)
            if are_all and not has_started:
                return True
        if not has_started:
            # The answers' threads need the interpreter.
            time.sleep(0.001)
            return False
        return is_step_due()

    def step(feeds: dict[SmallClient, Feed], expected: dict[SmallClient, Signals]) -> None:
        row_counts.append(len(feeds))
        step_batch(feeds, expected)

    monkeypatch.setattr(device, "_is_step_due", is_due)
    monkeypatch.setattr(device, "_prefill_must_wait", lambda: has_started and must_wait())
    monkeypatch.setattr(device, "_step_batch", step)
    return row_counts
