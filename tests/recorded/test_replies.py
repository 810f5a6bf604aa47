"""The large model for several answers at once: bounded, remembered, ended with the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from mlxroute.errors import LargeError
from mlxroute.recorded.replies import Replies
from mlxroute.types import LargeContext, LargeToken, Vocabulary
from tests.support.fakes import Reply, ScriptedLarge


class Held:
    """A call that lands when it is let go."""

    def __init__(self, large: Holding, tokens: tuple[LargeToken, ...]) -> None:
        self._large = large
        self._tokens = tokens
        self.ready = False

    @property
    def finished(self) -> bool:
        return self.ready

    def result(self) -> tuple[LargeToken, ...]:
        self._large.under_way -= 1
        return self._tokens

    def cancel(self) -> None:
        self._large.under_way -= 1


class Holding(ScriptedLarge):
    """Lets calls land when it is told to, and counts those under way."""

    model_name = "holding"

    def __init__(self, replies: list[Reply]) -> None:
        super().__init__(replies)
        self.held: list[Held] = []
        self.under_way = self.most = 0
        self.landed = threading.Condition()

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> Held:  # type: ignore[override]
        flight = Held(
            self, super().begin(context, deadline_s=deadline_s, prefetch=prefetch).result()
        )
        with self.landed:
            self.held.append(flight)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.landed.notify_all()
        return flight

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        with self.landed:
            self.landed.wait_for(ready, timeout_s)

    def let_go(self, count: int) -> None:
        """Let that many calls land, as soon as there are as many."""
        with self.landed:
            self.landed.wait_for(lambda: sum(not each.ready for each in self.held) >= count)
            for flight in [each for each in self.held if not each.ready][:count]:
                flight.ready = True
            self.landed.notify_all()


def context(*ids: int) -> LargeContext:
    return LargeContext(
        text="", token_ids=ids, fragment_ids=(), vocabulary=cast("Vocabulary", None)
    )


def asked(replies: Replies, *ids: int, prefetch: int = 0) -> tuple[LargeToken, ...]:
    view = replies.new_view()
    flight = view.begin(context(*ids), deadline_s=9, prefetch=prefetch)
    view.wait(lambda: flight.ready, timeout_s=9)
    return flight.result()


def test_no_more_calls_are_under_way_than_wanted(tmp_path: Path) -> None:
    large = Holding([(70,)])
    replies = Replies(large, tmp_path / "r", at_once=2)
    threads = [threading.Thread(target=asked, args=(replies, i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        large.let_go(2)
    for thread in threads:
        thread.join()
    assert (large.most, len(large.held)) == (2, 6)


def test_tokens_are_known_one_behind_the_other(tmp_path: Path) -> None:
    class Named(ScriptedLarge):
        model_name = "scripted"

    large = Named([(70,), (71, 72), (73,)])
    replies = Replies(large, tmp_path / "r")
    assert asked(replies, 1)[0].token_ids == (70,)
    assert asked(replies, 1, 70)[0].token_ids == (71, 72)
    silent = Named([LargeError("asked again")])
    again = Replies(silent, tmp_path / "r")
    assert [each.token_ids for each in asked(again, 1, prefetch=5)] == [(70,), (71, 72)]
    assert len(asked(again, 1, prefetch=0)) == 1
    assert silent.contexts == []
    view = again.new_view()
    flight = view.begin(context(1), deadline_s=9, prefetch=0)
    # The engine looks at what a call brought more than once.
    assert flight.result() == flight.result()
    assert (view.uploads.requests, view.uploads.tokens, view.uploads.completion_tokens) == (
        1,
        10,
        1,
    )


def test_a_call_that_was_made_counts_once_however_often_it_is_read(tmp_path: Path) -> None:
    large = Holding([(70,)])
    view = Replies(large, tmp_path / "r").new_view()
    flight = view.begin(context(1), deadline_s=9, prefetch=0)
    large.let_go(1)
    assert flight.result() == flight.result()
    assert view.uploads.requests == 1


def test_nobody_waits_once_the_run_has_ended(tmp_path: Path) -> None:
    large = Holding([(70,)])
    replies = Replies(large, tmp_path / "r")
    failed: list[LargeError] = []

    def ask(number: int) -> None:
        try:
            asked(replies, number)
        except LargeError as exc:
            failed.append(exc)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    replies.close()
    for thread in threads:
        thread.join()
    assert len(failed) == 2
    with pytest.raises(LargeError, match="ended"):
        asked(replies, 9)
