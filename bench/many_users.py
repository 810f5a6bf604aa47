"""Play many users of one replica of the large model on a virtual clock.

    python bench/many_users.py --step-ms 20 --call-ms 50 --at-once 8 --path-ms 30 --rate 7%

Each user has a small model of their own, writes answers without a pause and waits for each call
(mode `wait`). The replica serves calls in order, a fixed number at once. The times are arguments:
measure them for your models first, with `mlxroute probe` and `mlxroute bench latency`. Prints JSON.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from dataclasses import asdict, dataclass

from mlxroute.config import parse_share
from mlxroute.errors import ConfigError
from mlxroute.statistics import percentile

USERS = (10, 30, 100, 300, 1000, 3000, 10_000)
# The first part of the time is left out, because all users begin with an idle replica.
LEFT_OUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What users and replica are like.

    Args:
        step_s: Seconds of a decode step of the small model.
        rate: Share of the tokens that is escalated.
        calls_per_escalation: Calls for each escalated token.
        call_s: Seconds that the replica takes for a call while it serves `at_once` of them.
        at_once: Number of calls that the replica serves at once.
        path_s: Seconds between user and replica, there and back.
    """

    step_s: float
    rate: float
    call_s: float
    at_once: int
    path_s: float = 0.0
    calls_per_escalation: float = 1.0

    @property
    def calls_per_token(self) -> float:
        """Calls for each token of a user."""
        return self.rate * self.calls_per_escalation

    @property
    def capacity(self) -> float:
        """Calls a second that the replica can serve."""
        return self.at_once / self.call_s

    @property
    def unqueued_tokens_per_s(self) -> float:
        """Tokens a second of a user whose calls never wait for other users'."""
        waited_s = self.calls_per_token * (self.call_s + self.path_s)
        return 1 / (self.step_s + waited_s)

    @property
    def most_users(self) -> float:
        """Users whose calls the replica can just serve: capacity over calls/s of one user."""
        return self.capacity / (self.unqueued_tokens_per_s * self.calls_per_token)


@dataclass(frozen=True, slots=True)
class Played:
    """What some number of users get; times in seconds."""

    users: int
    calls_per_s: float
    tokens_per_s_of_a_user: float
    call_p50_s: float
    call_p95_s: float


def positive(text: str) -> float:
    """Parse a finite number above 0. Raises ValueError, which argparse reports."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def not_negative(text: str) -> float:
    """Parse a finite number from 0. Raises ValueError, which argparse reports."""
    return 0.0 if float(text) == 0 else positive(text)


def positive_count(text: str) -> int:
    """Parse a whole number above 0. Raises ValueError, which argparse reports."""
    return int(positive(str(int(text))))


def rate_between(text: str) -> float:
    """Parse a share, `7%` or 0.07, above 0 and below 1. Raises ArgumentTypeError."""
    try:
        rate = parse_share(text)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    if rate in (0, 1):
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0% and below 100%")
    return rate


def draw_tokens(chance: random.Random, calls_per_token: float) -> int:
    """Return a random number of tokens up to the next call; calls per token are below 1."""
    return 1 + int(math.log(1 - chance.random()) / math.log(1 - calls_per_token))


def play(load: Load, users: int, *, counted_s: float = 180.0, seed: int = 0) -> Played:
    """Return what users get who all write at the same time."""
    chance = random.Random(seed)
    first = [draw_tokens(chance, load.calls_per_token) for _ in range(users)]
    # When a call reaches the replica, and the tokens that were written before it.
    arrivals = [(tokens * load.step_s, tokens) for tokens in first]
    heapq.heapify(arrivals)
    free_at_s = [0.0] * load.at_once
    latencies_s, written = [], 0
    while arrivals[0][0] < LEFT_OUT_S + counted_s:
        arrived_s, tokens = heapq.heappop(arrivals)
        ended_s = max(arrived_s, heapq.heappop(free_at_s)) + load.call_s
        heapq.heappush(free_at_s, ended_s)
        back_s = ended_s + load.path_s
        if arrived_s >= LEFT_OUT_S:
            latencies_s.append(back_s - arrived_s)
            written += tokens
        following = draw_tokens(chance, load.calls_per_token)
        heapq.heappush(arrivals, (back_s + following * load.step_s, following))
    return Played(
        users,
        round(len(latencies_s) / counted_s, 2),
        round(written / counted_s / users, 2),
        round(percentile(latencies_s, 0.5), 3),
        round(percentile(latencies_s, 0.95), 3),
    )


def main() -> None:
    """Print the capacity of the replica, and what 10 to 10,000 users get."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=positive, required=True)
    parser.add_argument("--call-ms", type=positive, required=True)
    parser.add_argument("--at-once", type=positive_count, required=True)
    parser.add_argument("--path-ms", type=not_negative, default=0.0)
    parser.add_argument("--rate", type=rate_between, default="7%")
    parser.add_argument("--calls-per-escalation", type=positive, default=1.0)
    given = parser.parse_args()
    load = Load(
        step_s=given.step_ms / 1000,
        rate=given.rate,
        call_s=given.call_ms / 1000,
        at_once=given.at_once,
        path_s=given.path_ms / 1000,
        calls_per_escalation=given.calls_per_escalation,
    )
    if load.calls_per_token >= 1:
        parser.error("--rate times --calls-per-escalation must be below 1 call a token")
    report = {
        "load": asdict(load),
        "capacity_calls_per_s": round(load.capacity, 1),
        "most_users": round(load.most_users),
        "users": [asdict(play(load, users)) for users in USERS],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
