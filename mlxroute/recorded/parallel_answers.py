"""A function applied to several answers at a time, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from mlxroute.recorded.recording_large import RecordingLarge

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_answers(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    large: RecordingLarge,
    at_once: int,
    on_answer: Callable[[], None],
) -> list[_Result]:
    """Return the results of `function` for the items, in their order.

    At most `at_once` items are processed at a time; `on_answer` is called after each of them, in
    its thread. The first exception closes `large`, which ends the other calls, and is raised.
    """

    def process(item: _Item) -> _Result:
        result = function(item)
        on_answer()
        return result

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(process, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            large.close()
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]
