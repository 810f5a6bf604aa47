"""Prefetched tokens are counted while calls are added."""

from __future__ import annotations

from mlxroute.engine.escalation.prefetch import PrefetchedTokens
from mlxroute.types import LargeToken
from tests.support.worlds import token_of


class ReentrantCall:
    """A finished call; the third time it is read, another call is added."""

    ready = finished = True

    def __init__(self, prefetched: PrefetchedTokens) -> None:
        self._prefetched = prefetched
        self._count = 0

    def result(self) -> tuple[LargeToken, ...]:
        self._count += 1
        if self._count == 3:
            self._prefetched.add((9,), ReentrantCall(self._prefetched), max_tokens=4)
        return (token_of((5,)), token_of((6,)))

    def cancel(self) -> None:
        pass


def test_a_call_may_be_added_while_the_tokens_are_counted() -> None:
    prefetched = PrefetchedTokens()
    for _ in range(2):
        prefetched.add((), ReentrantCall(prefetched), max_tokens=4)
    assert [prefetched.generated for _ in range(3)][-1] == 4
