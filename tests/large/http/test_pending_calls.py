"""The calls of a client that several threads use, such as the answers of an endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import pytest

from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.pending_calls import PendingCall, PendingCalls, Tokens


class Condition(threading.Condition):
    """A condition that calls a function where a thread has to wait for its lock."""

    def __init__(self, on_wait: Callable[[], object]) -> None:
        super().__init__()
        self._on_wait = on_wait

    def __enter__(self) -> bool:
        if not self.acquire(blocking=False):
            self._on_wait()
            self.acquire()
        return True


class EarlierCall:
    """A call that lets another thread start a call while it is being looked at."""

    def __init__(self, let_other_start: Callable[[], None]) -> None:
        self._let_other_start = let_other_start

    @property
    def finished(self) -> bool:
        self._let_other_start()
        return True

    def join(self, timeout: float) -> None:
        pass


@pytest.mark.parametrize("is_join", [False, True], ids=["start", "join"])
def test_a_call_started_while_another_thread_drops_finished_ones_is_kept(is_join: bool) -> None:
    release, has_gone_on = threading.Event(), threading.Event()

    def ask(deadline: Deadline, publish: Callable[[Tokens], None]) -> Tokens:
        assert release.wait(20)
        return ()

    def start_other() -> None:
        calls.start(ask, late)
        has_gone_on.set()

    def let_other_start() -> None:
        other.start()
        # It has started its call, or it waits until this thread has dropped the finished ones.
        assert has_gone_on.wait(20)

    calls, late = PendingCalls(), Deadline(30)
    other = threading.Thread(target=start_other)
    calls._changed = Condition(has_gone_on.set)
    calls._calls = [cast("PendingCall", EarlierCall(let_other_start))]
    if is_join:
        calls.join()
    else:
        calls.start(ask, Deadline(30))
    other.join(20)
    calls.cancel()
    release.set()
    assert late.cancelled
