"""Tasks in daemon threads: nothing waits for one whose server does not answer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

from mlxroute.closeable import Closeable

Result = TypeVar("Result")


class DaemonTasks(Closeable, Generic[Result]):
    """Runs functions in daemon threads, and returns their results in the order in which they end.

    A pool of `multiprocessing` would start a process for its semaphores on a Mac, and the end of
    the program would wait for the threads of `concurrent.futures`.

    Args:
        tasks: The functions, which begin in this order.
        threads: How many of them run at a time.
    """

    def __init__(self, tasks: Sequence[Callable[[], Result]], *, threads: int) -> None:
        self._waiting = deque(tasks)
        self._ended: SimpleQueue[Future[Result]] = SimpleQueue()
        for _ in range(min(threads, len(tasks))):
            threading.Thread(target=self._run, daemon=True, name="mlxroute-task").start()

    def next_result(self, timeout_s: float) -> Result:
        """Return the result of the next task that ends, or raise what that task raised.

        Raises queue.Empty if none ends in `timeout_s` seconds.
        """
        return self._ended.get(timeout=timeout_s).result()

    def close(self) -> None:
        """Begin no further task; those that run are left alone."""
        self._waiting.clear()

    def _run(self) -> None:
        while True:
            try:
                task = self._waiting.popleft()
            except IndexError:
                return
            outcome: Future[Result] = Future()
            try:
                outcome.set_result(task())
            except BaseException as exc:  # noqa: BLE001 - `next_result` raises it
                outcome.set_exception(exc)
            self._ended.put(outcome)
