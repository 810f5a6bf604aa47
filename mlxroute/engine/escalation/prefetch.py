"""Large tokens that came before they were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from mlxroute.engine.protocols import PendingCallProtocol
from mlxroute.errors import LargeProtocolError
from mlxroute.types import LargeToken

_REMEMBERED = 8


class _Run:
    """The large model's tokens after these ids of the answer, as far as a flight brought them."""

    def __init__(self, before: tuple[int, ...], flight: PendingCallProtocol, most: int) -> None:
        self._before = before
        self._flight = flight
        self._most = most
        self.told = False

    @property
    def tokens(self) -> tuple[LargeToken, ...]:
        return self._flight.result()

    @property
    def coming(self) -> bool:
        """Whether there may be more of them."""
        return not self._flight.finished and len(self.tokens) < self._most

    def after(self, ids: Sequence[int]) -> LargeToken | None:
        """The token after `ids`, where these follow the run to the end of one of its tokens."""
        if (at := self._end_of_before(ids)) is None:
            return None
        for number, token in enumerate(self.tokens):
            # The call itself answers the position it was made for.
            if number and at == len(ids):
                return token
            end = at + len(token.token_ids)
            if tuple(ids[at:end]) != token.token_ids:
                break
            at = end
        return None

    def may_reach(self, ids: Sequence[int]) -> bool:
        """Whether the token after `ids` may still come: they are not off the run, nor past it."""
        if not self.coming or (at := self._end_of_before(ids)) is None:
            return False
        path = [token_id for token in self.tokens for token_id in token.token_ids]
        beyond = len(ids) - at - len(path)
        # A token takes at least one id.
        return 0 <= beyond < self._most - len(self.tokens) and list(ids[at:])[: len(path)] == path

    def is_left_by(self, ids: Sequence[int]) -> bool:
        """Whether an answer that begins with `ids` is another than the run."""
        path = [*self._before, *(each for token in self.tokens for each in token.token_ids)]
        return any(a != b for a, b in zip(ids, path, strict=False))

    def end(self) -> None:
        if not self._flight.finished:
            self._flight.cancel()

    def _end_of_before(self, ids: Sequence[int]) -> int | None:
        at = len(self._before)
        return at if tuple(ids[:at]) == self._before else None


class Place:
    """The token after some ids that a call under way may bring, as a flight of its own."""

    def __init__(self, run: _Run, ids: tuple[int, ...]) -> None:
        self._run = run
        self._ids = ids

    @property
    def ready(self) -> bool:
        """Whether the token is there, or will not come."""
        return self._run.after(self._ids) is not None or not self._run.may_reach(self._ids)

    @property
    def finished(self) -> bool:
        return self.ready

    def result(self) -> tuple[LargeToken, ...]:
        """The token, none where the run turned out to be another way.

        Raises LargeProtocolError where the call ended too early.
        """
        if (token := self._run.after(self._ids)) is not None:
            return (token,)
        if self._run.is_left_by(self._ids):
            return ()
        raise LargeProtocolError("a call to the large model ended before its last token")

    def cancel(self) -> None:
        """Others may wait for the same run."""


class Prefetched:
    """Answers later positions as calls for them would, while the answer follows the large model."""

    def __init__(self) -> None:
        self._runs: deque[_Run] = deque()
        self._forgotten = 0

    @property
    def generated(self) -> int:
        """How many tokens came that no call was made for."""
        return self._forgotten + sum(len(run.tokens) - 1 for run in self._runs)

    def add(self, ids: Sequence[int], flight: PendingCallProtocol, *, most: int) -> None:
        """A call after `ids` has brought its token, and may bring up to `most` in all."""
        run = _Run(tuple(ids), flight, most)
        if run.coming or len(run.tokens) > 1:
            self._runs.appendleft(run)
        if len(self._runs) > _REMEMBERED:
            oldest = self._runs.pop()
            oldest.end()
            self._forgotten += len(oldest.tokens) - 1

    def find(self, ids: Sequence[int]) -> LargeToken | None:
        """The large model's token after these ids of the answer, if it is known."""
        found = (run.after(ids) for run in self._runs)
        return next((token for token in found if token is not None), None)

    def coming(self, ids: Sequence[int]) -> Place | None:
        """The place of the token after these ids in a call under way that may bring it."""
        run = next((run for run in self._runs if run.may_reach(ids)), None)
        return None if run is None else Place(run, tuple(ids))

    def take_ended(self) -> Iterator[tuple[LargeToken, ...]]:
        """The tokens of each call that has ended, once."""
        for run in self._runs:
            if not run.told and not run.coming:
                run.told = True
                yield run.tokens

    def committed(self, ids: Sequence[int], count: int) -> None:
        """End what is under way along other answers than one that begins with `count` of `ids`."""
        for run in self._runs:
            if run.coming and run.is_left_by(ids[:count]):
                run.end()

    def close(self) -> None:
        """End what is under way."""
        for run in self._runs:
            run.end()
