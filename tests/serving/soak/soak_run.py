"""A soak run: clients that stay or leave, while faults of the large side come and go."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from mlxroute.types import Token
from tests.serving.soak.planned_requests import Leaving, Plan, Variant, compare_answer
from tests.support.endpoint import read_stream
from tests.support.network_faults import FAULTS, FaultProxy

_TIMEOUT_S: Final = 60.0
_SETTLE_S: Final = 15.0
# Replies of these take the proxy itself long.
_SLOW_FAULTS: Final = ("20 MB",)


@contextlib.contextmanager
def served(model: Path, large_url: str) -> Iterator[ServedProcess]:
    """Serve a model in a process of its own, which must end in order."""
    arguments = [sys.executable, "-m", f"{__package__}.served_process", str(model), large_url]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield ServedProcess(process, int(process.stdout.readline() or 0))
            process.terminate()
            _, error = process.communicate(timeout=20)
            assert (process.returncode, error) == (0, "")
        finally:
            process.kill()


@dataclass(slots=True)
class ServedProcess:
    """The endpoint's process.

    Args:
        process: The process.
        port: Its port.
    """

    process: subprocess.Popen[str]
    port: int

    def state(self) -> dict[str, Any]:
        """Return what the endpoint holds."""
        with self.connection() as connection:
            connection.request("GET", "/state")
            value: dict[str, Any] = json.loads(connection.getresponse().read())
        return value

    def resident_bytes(self) -> int:
        """Return the memory of the process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def clients(self) -> int:
        """Return how many sockets of clients the process has."""
        sockets = psutil.Process(self.process.pid).net_connections("tcp")
        return sum(s.laddr.port == self.port and s.status != "LISTEN" for s in sockets)

    def files(self) -> int:
        """Return the number of open files and sockets."""
        return int(psutil.Process(self.process.pid).num_fds())

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """Yield a connection that is closed at the end."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT_S)
        ) as connection:
            yield connection


@dataclass(slots=True)
class SoakRun:
    """The clients of a run, and what they saw.

    Args:
        served: The endpoint.
        proxy: The proxy in front of the large model.
        variants: The answers.
        alone: Their tokens alone.
    """

    served: ServedProcess
    proxy: FaultProxy
    variants: Sequence[Variant]
    alone: Sequence[Sequence[Token]]
    ends: Counter[str] = field(default_factory=Counter)
    ties: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _has_ended: threading.Event = field(default_factory=threading.Event)

    def play(
        self, plans: Sequence[Plan], *, clients: int = 1, faults: random.Random | None = None
    ) -> None:
        """Send all requests from several clients, with faults in between that `faults` draws."""
        waiting: queue.SimpleQueue[Plan] = queue.SimpleQueue()
        for plan in plans:
            waiting.put(plan)
        threads = [
            threading.Thread(target=self._act_as_client, args=(waiting,)) for _ in range(clients)
        ]
        disturbing = threading.Thread(target=self._play_faults, args=(faults,))
        if faults is not None:
            disturbing.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._has_ended.set()
        if faults is not None:
            disturbing.join()

    def _act_as_client(self, waiting: queue.SimpleQueue[Plan]) -> None:
        while True:
            try:
                plan = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                end = self._leave(plan) if plan.leaving else self._stay(plan)
            except Exception as exc:  # noqa: BLE001 - the test shows it
                end = "error"
                self.errors.append(f"request {plan.number}: {type(exc).__name__}: {exc}")
            with self._lock:
                self.ends[end] += 1
                self.resident_bytes.append(self.served.resident_bytes())

    def _leave(self, plan: Plan) -> str:
        """Send a request and leave before its reply is complete."""
        with self.served.connection() as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(plan.body))
            if plan.leaving is Leaving.IN_STREAM:
                with contextlib.closing(connection.getresponse()) as response:
                    assert response.status == 200
                    for _ in range(int(plan.after)):
                        response.readline()
            else:
                time.sleep(plan.after)
        return str(plan.leaving)

    def _stay(self, plan: Plan) -> str:
        """Send a request and compare its reply with the answer alone."""
        with self.served.connection() as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(plan.body))
            response = connection.getresponse()
            text = response.read().decode()
        assert response.status == 200, text
        entries, summary = _read_reply(text, is_stream=plan.body["stream"])
        unchecked = sum(not entry["checked"] for entry in entries)
        # Logprobs have no end token, which may be the one that was not checked.
        hidden = summary["unchecked"] - unchecked
        assert hidden in (0, 1), summary
        assert bool(summary["unchecked"]) == bool(summary.get("failures")), summary
        alone = self.alone[plan.variant][: len(entries) if hidden else None]
        tie = compare_answer(self.variants[plan.variant], alone, entries)
        if tie:
            self.ties.append(f"request {plan.number}: {tie}")
        return "near tie" if tie else "partly unchecked" if summary["unchecked"] else "equal"

    def _play_faults(self, rng: random.Random) -> None:
        faults = [fault for fault in FAULTS if fault.name not in _SLOW_FAULTS]
        while not self._has_ended.wait(rng.uniform(0.2, 0.8)):
            with contextlib.ExitStack() as stack:
                if rng.random() < 0.2:
                    stack.enter_context(self.proxy.server.gone())
                    self.proxy.played["refused"] += 1
                else:
                    self.proxy.plan(rng.choice(faults), count=10**6)
                    if rng.random() < 0.3:
                        self.proxy.server.hang_up()
                self._has_ended.wait(rng.uniform(0.2, 0.8))
            self.proxy.plan(None)

    def settled_state(self) -> dict[str, Any]:
        """Return what the endpoint holds once nothing of an answer is left, or after a while.

        The pause after the last failure of the large model has to be over too.
        """
        end_s = time.monotonic() + _SETTLE_S
        while (left := self._left()) and time.monotonic() < end_s:
            time.sleep(0.1)
        return left

    def _left(self) -> dict[str, Any]:
        """Return what an idle endpoint should not hold; empty if there is nothing."""
        state = self.served.state()
        names = (
            "running",
            "queued",
            "requests",
            "prefills",
            "decoding",
            "awaited",
            "batch_bytes",
            "paused",
        )
        threads = {
            name: count
            for name, count in state["threads"].items()
            if name in ("mlxroute-answer", "mlxroute-events", "mlxroute-call", "mlxroute-exchange")
        }
        left = {name: state[name] for name in names} | threads | {"clients": self.served.clients()}
        return {name: count for name, count in left.items() if count}

    def growth_bytes(self) -> int:
        """Return how much the memory has grown after the first quarter."""
        sizes = self.resident_bytes
        return max(sizes[len(sizes) // 4 :]) - sizes[len(sizes) // 4]

    def report(self) -> str:
        """Return a line of figures, and the near ties."""
        played = self.proxy.played
        line = (
            f"{self.ends.total()} requests: {dict(self.ends)}; {played.total()} faults of"
            f" {len(played)} kinds; memory {self.resident_bytes[-1] / 1e6:.0f} MB,"
            f" {self.growth_bytes() / 1e6:+.1f} MB after the first quarter"
        )
        return "\n".join([line, *self.ties, *self.errors[:20]])


def _read_reply(text: str, *, is_stream: bool) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Return the tokens and the summary of a complete reply."""
    if not is_stream:
        reply = json.loads(text)
        return reply["choices"][0]["logprobs"]["content"], reply["mlxroute"]
    *chunks, done = read_stream(text)
    assert done == "[DONE]", text[-300:]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    entries = [e for choice in choices if choice["logprobs"] for e in choice["logprobs"]["content"]]
    return entries, chunks[-1]["mlxroute"]
