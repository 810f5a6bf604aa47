"""Check `many_users.py` against a real server of the large model, with 1 to 32 callers.

Start a server first, then run this script with its address:

    python bench/real_replica.py http://127.0.0.1:8081/v1 --step-ms 250 --rate 7%

A caller is a user as `many_users.py` plays them, with a clock in place of the small model: it waits
for the tokens up to its next call, then asks for one token. Its conversation grows by these tokens
from call to call. Before each number of callers, the time of a call is measured with callers that
do not pause; with it, that number is played. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from many_users import Load, draw_tokens, play, positive, positive_count, rate_between

from mlxroute import LargeModel, SmallModel
from mlxroute.cli.bench_report import read_builtin_prompts
from mlxroute.statistics import percentile
from mlxroute.types import LargeContext, Message, Span

# What callers write. The large model answers as well to any text.
FILLER = Path(__file__).parents[1] / "docs" / "trace-a-token.md"
CALLERS = (1, 2, 4, 8, 16, 32)
CALLERS_PER_SLOT = 4
TIMEOUT_S = 600.0
PLAYED_S = 7200.0


@dataclass
class Caller:
    """One conversation, and its calls in the present measurement.

    Args:
        small: The small model, whose vocabulary the calls use.
        messages: The conversation.
        filler: Token ids that it goes on with.
        chance: Draws the tokens between calls.
    """

    small: SmallModel
    messages: tuple[Message, ...]
    filler: itertools.cycle[int]
    chance: random.Random
    written: list[int] = field(default_factory=list)
    calls: list[tuple[float, float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prompt = self.small.encode_conversation(self.messages)

    def call(self, large: LargeModel, tokens: int) -> None:
        """Write some tokens, ask for the next one, and note when, how long and after how many."""
        self.written += itertools.islice(self.filler, tokens - 1)
        began_s = time.perf_counter()
        reply = large.next_token(self._context())
        self.calls.append((began_s, time.perf_counter() - began_s, tokens))
        self.written += itertools.islice(self.filler, 1) if reply.is_eos else reply.token_ids

    def _context(self) -> LargeContext:
        vocabulary = self.small.vocabulary
        pieces = [vocabulary.token_bytes(token_id) or b"" for token_id in self.written]
        text = b"".join(pieces).decode(errors="replace")
        return LargeContext(
            text=self._prompt.text + text,
            token_ids=(*self._prompt.ids, *self.written),
            fragment_ids=(),
            vocabulary=vocabulary,
            messages=self.messages,
            spans=(Span(text),),
            prompt=self._prompt.rendered,
        )


def make_callers(small: SmallModel, count: int) -> list[Caller]:
    """Return callers with conversations of their own."""
    filler = [i for i in small.vocabulary.encode(FILLER.read_text("utf-8")) if _is_whole(small, i)]
    callers = []
    for number, prompt in enumerate(
        itertools.islice(itertools.cycle(read_builtin_prompts()), count)
    ):
        begin = 97 * number % len(filler)
        messages: tuple[Message, ...] = ({"role": "user", "content": f"{number}. {prompt}"},)
        ids = itertools.cycle([*filler[begin:], *filler[:begin]])
        callers.append(Caller(small, messages, ids, random.Random(number)))
    return callers


def _is_whole(small: SmallModel, token_id: int) -> bool:
    """Return whether a token is whole characters, so that any of them may follow it."""
    data = small.vocabulary.token_bytes(token_id) or b""
    return data.isascii() and bool(data)


def run(
    callers: Sequence[Caller], large: LargeModel, load: Load, *, left_out_s: float, counted_s: float
) -> dict[str, Any]:
    """Have all callers call until the time is over; return their figures in the counted part."""
    began_s = time.perf_counter()
    end_s = began_s + left_out_s + counted_s

    def act(caller: Caller) -> None:
        while True:
            tokens = draw_tokens(caller.chance, load.calls_per_token)
            time.sleep(max(0.0, min(tokens * load.step_s, end_s - time.perf_counter())))
            if time.perf_counter() >= end_s:
                return
            caller.call(large, tokens)

    threads = [threading.Thread(target=act, args=(caller,)) for caller in callers]
    for caller in callers:
        caller.calls.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = [c for caller in callers for c in caller.calls]
    # A call counts where it ends, so that the calls of a busy replica are not counted twice.
    counted = [c for c in calls if began_s + left_out_s <= c[0] + c[1] < end_s]
    seconds = [s for _, s, _ in counted]
    return {
        "calls": len(counted),
        "calls_per_s": round(len(counted) / counted_s, 2),
        "tokens_per_s_of_a_user": round(sum(c[2] for c in counted) / counted_s / len(callers), 2),
        "call_p50_s": round(percentile(seconds, 0.5), 3),
        "call_p95_s": round(percentile(seconds, 0.95), 3),
    }


def time_busy_replica(
    callers: Sequence[Caller], large: LargeModel, rate: float, at_once: int, seconds: float
) -> float:
    """Return the seconds of a call while the replica serves `at_once` of them without a pause.

    Raises SystemExit if none ends in the given seconds.
    """
    unpaused = Load(step_s=0.0, rate=rate, call_s=1.0, at_once=at_once)
    figures = run(
        callers[: CALLERS_PER_SLOT * at_once], large, unpaused, left_out_s=1.0, counted_s=seconds
    )
    if not figures["calls"]:
        raise SystemExit(f"no call ended in {seconds:g} s; use more --seconds")
    return at_once * seconds / int(figures["calls"])


def main() -> None:
    """Measure, play and print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--small", default="qwen2.5-coder-0.5b")
    parser.add_argument("--step-ms", type=positive, default=250.0)
    parser.add_argument("--rate", type=rate_between, default="7%")
    parser.add_argument("--at-once", type=positive_count, default=1)
    parser.add_argument("--callers", type=positive_count, nargs="+", default=CALLERS)
    parser.add_argument("--seconds", type=positive, default=20.0)
    given = parser.parse_args()
    small = SmallModel.load(given.small)
    callers = make_callers(small, max(CALLERS_PER_SLOT * given.at_once, *given.callers))
    rate = given.rate
    with LargeModel(given.address, timeout_s=TIMEOUT_S) as large:
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        for caller in callers:
            caller.call(large, 1)
        rows = []
        for count in given.callers:
            call_s = time_busy_replica(callers, large, rate, given.at_once, given.seconds / 2)
            load = Load(given.step_ms / 1000, rate, call_s, given.at_once)
            times = {"left_out_s": given.seconds / 3, "counted_s": given.seconds}
            measured = run(callers[:count], large, load, **times)
            played = asdict(play(load, count, counted_s=PLAYED_S))
            row = {
                "callers": count,
                "call_s": round(call_s, 4),
                "most_users": round(load.most_users, 1),
            }
            rows.append({**row, "measured": measured, "played": played})
            print(rows[-1], file=sys.stderr)
    report = {
        "command": f"python bench/real_replica.py {shlex.join(sys.argv[1:])}",
        "large": large.model_name,
        "small": given.small,
        "step_ms": given.step_ms,
        "rate": rate,
        "at_once": given.at_once,
        "callers": rows,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
