"""Tasks in daemon threads: their results, and what happens to them at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty

import pytest

from mlxroute.weights.daemon_tasks import DaemonTasks


def fail() -> str:
    raise OSError("no route")


def test_results_come_as_the_tasks_end_and_errors_where_they_are_asked_for() -> None:
    release = threading.Event()

    def last() -> str:
        release.wait(60)
        return "last"

    with DaemonTasks([last, lambda: "first", fail], threads=2) as tasks:
        assert tasks.next_result(60) == "first"
        with pytest.raises(OSError, match="no route"):
            tasks.next_result(60)
        with pytest.raises(Empty):
            tasks.next_result(0.01)
        release.set()
        assert tasks.next_result(60) == "last"


def test_no_task_begins_after_the_end_of_the_block() -> None:
    has_begun, release, began = threading.Event(), threading.Event(), list[int]()

    def task(number: int) -> int:
        began.append(number)
        has_begun.set()
        release.wait(60)
        return number

    numbered: list[Callable[[], int]] = [partial(task, number) for number in range(3)]
    with DaemonTasks(numbered, threads=1) as tasks:
        assert has_begun.wait(60)
    release.set()
    assert tasks.next_result(60) == 0
    with pytest.raises(Empty):
        tasks.next_result(0.05)
    assert began == [0]


def test_a_process_ends_while_a_task_still_runs() -> None:
    program = (
        "import time; from mlxroute.weights.daemon_tasks import DaemonTasks\n"
        "DaemonTasks([lambda: time.sleep(600)], threads=1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
