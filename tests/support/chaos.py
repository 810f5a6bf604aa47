"""A chaos run: many answers in a row through a proxy that plays faults at random moments."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.conversation import Conversation
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.large.http import circuit_breaker
from mlxroute.routers import make_router
from mlxroute.types import CallFailure, Mode, RunStats, StopReason, Token
from tests.support.network_faults import FAULTS, FaultProxy, NetworkFault

TURNS: Final = 10
# Far more than a busy machine adds to the waiting of an answer, and to the whole answer.
_SLACK_S: Final = 20.0
_HANGING_S: Final = 110.0
_SETTLE_S: Final = 10.0
# Turns of each chat without a fault.
_QUIET_TURNS: Final = 2
_ENDS: Final = {StopReason.EOS, StopReason.LENGTH}
# A context in which a server is gone; it may be entered and left in mid-answer.
Accident = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens during one answer: a fault on some requests, in one mode.

    An `accident` lasts for as many tokens instead.
    """

    fault: NetworkFault | None
    accident: str | None
    first: int
    count: int
    mode: Mode
    prefetch: int

    @property
    def is_harmless(self) -> bool:
        """Whether every position must be checked."""
        return self.accident is None and (self.fault is None or self.fault.harmless)

    def __str__(self) -> str:
        name = self.fault.name if self.fault else self.accident or "no fault"
        return f"{name}, {self.first}+{self.count}, {self.mode}, prefetch {self.prefetch}"


@dataclass(slots=True)
class Chaos:
    """Chats with one client through a proxy.

    Args:
        small: The small model.
        proxy: The proxy, whose address `large` has.
        large: The client.
        reference: Another client of the same address, for undisturbed answers.
        rng: Decides what happens; its seed repeats it.
        threshold: The router's threshold.
        max_tokens: Maximum length of an answer.
        timeout_s: Time limit of a call, and of all failures of an answer.
        pause_s: Maximum pause of the circuit breaker, which is over before the next answer.
        router: The name of the router. Its positions must be many enough in every turn.
        calls: Least number of calls of an undisturbed answer; a fault begins at one of them.
        modes: The modes to choose from.
        accidents: Further faults by name.
    """

    small: SmallProtocol
    proxy: FaultProxy
    large: LargeModel
    reference: LargeModel
    rng: random.Random
    threshold: float
    max_tokens: int
    timeout_s: float
    pause_s: float
    router: str = "entropy"
    calls: int = 5
    modes: tuple[Mode, ...] = tuple(Mode)
    accidents: dict[str, Accident] = field(default_factory=dict)
    answers: int = 0
    compared: int = 0
    disturbed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    resident_bytes: list[int] = field(default_factory=list)
    _queue: list[NetworkFault | str] = field(default_factory=list)

    def chat(self) -> None:
        """Play one chat of ten turns and check every answer."""
        conversation = Conversation(system="Answer briefly.")
        quiet_turns = self.rng.sample(range(TURNS), _QUIET_TURNS)
        for turn in range(TURNS):
            question = f"Question {turn}: what is {self.rng.randrange(100)} good for?"
            plan = self._plan(is_quiet=turn in quiet_turns)
            print(f"answer {self.answers}: {plan}", flush=True)  # noqa: T201
            messages = [*conversation.messages, {"role": "user", "content": question}]
            conversation.add(question, self._answer(messages, plan))
            self.answers += 1
            gc.collect()
            self.resident_bytes.append(psutil.Process().memory_info().rss)
        check_threads_end("mlxroute-call", "mlxroute-exchange")

    def _plan(self, *, is_quiet: bool) -> Plan:
        if not self._queue:
            self._queue = [*FAULTS, *self.accidents]
            self.rng.shuffle(self._queue)
        drawn = None if is_quiet else self._queue.pop()
        fault = drawn if isinstance(drawn, NetworkFault) else None
        accident = drawn if isinstance(drawn, str) else None
        mode = self.rng.choice(self.modes)
        prefetch = self.rng.choice((0, 4)) if mode is Mode.WAIT else 0
        count = self.rng.choice((1, 1, 2, 5, 1000))
        return Plan(fault, accident, self.rng.randrange(self.calls), count, mode, prefetch)

    def _answer(self, messages: list[dict[str, str]], plan: Plan) -> str:
        """Play one answer and check it; return its text."""
        reported: list[CallFailure] = []
        played_before = self.proxy.played.total()
        self.proxy.plan(plan.fault, first=plan.first, count=plan.count)
        began_s = time.monotonic()
        tokens: list[Token] = []
        with contextlib.ExitStack() as stack:
            answer = self._generate(self.large, messages, plan, on_failure=reported.append)
            for token in answer:
                tokens.append(token)
                if plan.accident and token.index == plan.first:
                    stack.enter_context(self.accidents[plan.accident]())
                    self.proxy.played[plan.accident] += 1
                elif token.index == plan.first + plan.count:
                    stack.close()
        took_s = time.monotonic() - began_s
        self.proxy.plan(None)
        stats: RunStats = answer.stats()
        is_disturbed = self.proxy.played.total() > played_before
        self.disturbed += is_disturbed
        self._check(stats, tokens, reported)
        assert stats.stall_s < self._limit_s(self.large, plan) + _SLACK_S
        assert took_s < _HANGING_S, f"{took_s:.1f} s"
        assert not (plan.is_harmless and stats.failures), stats.failures
        if plan.prefetch == 0 or not is_disturbed:
            self._compare(messages, plan, tokens)
        if stats.failures:
            self._end_pause(messages)
        for failure in stats.failures:
            self.failures[failure.kind] += failure.count
        return stats.text

    def _end_pause(self, messages: list[dict[str, str]]) -> None:
        """Let a pause of calls end, and a single call close the circuit breaker."""
        time.sleep(self.pause_s)
        list(
            generate(
                self.small,
                self.large,
                messages,
                router=EntropyRouter(-math.inf),
                max_tokens=1,
                timeout_s=60.0,
                mode=Mode.WAIT,
            )
        )

    def _check(self, stats: RunStats, tokens: list[Token], reported: list[CallFailure]) -> None:
        """Check that an answer is whole, and that what failed is counted and said."""
        assert stats.finish_reason in _ENDS
        assert stats.text == "".join(token.text for token in tokens)
        assert [token.index for token in tokens] == list(range(stats.tokens))
        unchecked = [token for token in tokens if not token.checked]
        assert all(token.token_id == token.signals.token_id for token in unchecked)
        assert stats.unchecked == len(unchecked) == sum(f.count for f in stats.failures)
        assert [f.kind for f in reported] == list(dict.fromkeys(f.kind for f in stats.failures))
        assert all(f.reason and f.reason.isprintable() for f in reported)

    def _compare(self, messages: list[dict[str, str]], plan: Plan, tokens: list[Token]) -> None:
        """Compare an answer with the undisturbed one, up to its first unchecked token."""
        undisturbed = list(self._generate(self.reference, messages, plan))
        assert all(token.checked for token in undisturbed)
        checked = next((n for n, token in enumerate(tokens) if not token.checked), len(tokens))
        is_whole = checked == len(tokens)
        self.compared += is_whole
        expected = [token.text for token in undisturbed][: None if is_whole else checked]
        received = [token.text for token in tokens[:checked]]
        assert received == expected, f"{received} instead of {expected}, {self._dialects()}"

    def _dialects(self) -> str:
        """Return how the two clients call the server."""
        pairings = [large._negotiator.pairing for large in (self.large, self.reference)]
        return " and ".join(f"{p.dialect.name}, {p.comparison}" if p else "-" for p in pairings)

    def _generate(
        self, large: LargeModel, messages: list[dict[str, str]], plan: Plan, **options: Any
    ) -> Any:
        return generate(
            self.small,
            large,
            messages,
            router=make_router(self.router, threshold=self.threshold),
            max_tokens=self.max_tokens,
            timeout_s=self._limit_s(large, plan),
            mode=plan.mode,
            prefetch=plan.prefetch,
            **options,
        )

    def _limit_s(self, large: LargeModel, plan: Plan) -> float:
        """Return the time limit of failures; a busy machine must not exceed it without a fault."""
        return 60.0 if large is self.reference or plan.is_harmless else self.timeout_s

    def report(self) -> str:
        """Return one line of figures."""
        growth = self.resident_bytes[-1] - self.resident_bytes[len(self.resident_bytes) // 4]
        return (
            f"{self.answers} answers, {self.disturbed} disturbed, {self.compared} compared whole,"
            f" {self.proxy.played.total()} faults of {len(self.proxy.played)} kinds, failures"
            f" {dict(self.failures)}, memory {growth / 1e6:+.1f} MB"
        )


def shorten_pauses(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Bound every pause of the circuit breaker, which would end the faults for minutes."""
    for name in ("_FIRST_PAUSE_S", "_MAX_PAUSE_S", "_MAX_RETRY_AFTER_S"):
        monkeypatch.setattr(circuit_breaker, name, seconds)


def check_threads_end(*names: str) -> None:
    """Check that the threads of these names end in time."""
    end_s = time.monotonic() + _SETTLE_S
    for thread in threading.enumerate():
        if thread.name in names:
            thread.join(max(0.0, end_s - time.monotonic()))
            assert not thread.is_alive(), thread


@contextlib.contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Check that no thread, open file, socket, child or temporary file is added.

    What earlier tests left may end meanwhile.
    """
    before_directory, tempfile.tempdir = tempfile.tempdir, str(folder)
    # pytest keeps records; that of an invalid header has a traceback, and so its connection.
    before_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    before = _resources()
    # The collection after each answer then leaves out what was there before, hundreds of modules.
    gc.collect()
    gc.freeze()
    try:
        yield
        gc.unfreeze()
        end_s = time.monotonic() + _SETTLE_S
        while (added := _resources() - before) and time.monotonic() < end_s:
            gc.collect()
            time.sleep(0.05)
        assert not added, (added, before)
        assert list(folder.iterdir()) == []
    finally:
        logging.disable(before_level)
        tempfile.tempdir = before_directory


def _resources() -> Counter[str]:
    """Count what this process uses, by kind, and threads and children one by one."""
    process = psutil.Process()
    counts = Counter(f"thread {thread.name}" for thread in threading.enumerate())
    counts.update(f"child {child.pid}" for child in process.children(recursive=True))
    counts["descriptors"] = process.num_fds()
    counts["connections"] = len(process.net_connections(kind="all"))
    return counts
