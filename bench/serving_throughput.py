"""Measure answers written at a time against one: tokens per second, and the second turn of a chat.

    python bench/serving_throughput.py alone|together|routed|second-turn [SMALL] [TOKENS] [ROUNDS]

- `alone`: seconds per token of the scheduler with one answer against those of `generate`, in turns.
- `together`: tokens per second of 4 and of 8 clients over those of one, never escalating.
- `routed`: those of 4 clients over those of one at a budget of 7 %, with calls of 34 steps. The
  large model is a timer whose tokens never agree.
- `second-turn`: seconds to the first token in the second turn of a chat of 2,000 tokens, over those
  of a new prompt of some 50 tokens.

In `together` and `routed` each client asks again as soon as it is answered, for one or three
minutes. TOKENS is the longest answer.

Prints a line per measurement and JSON at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mlxroute import EntropyRouter, SmallModel, generate
from mlxroute.bench.quality.question_runs import median_step_s
from mlxroute.cli.bench_report import read_builtin_prompts
from mlxroute.engine import Options
from mlxroute.engine.protocols import LargeProtocol
from mlxroute.routers import Router, never_escalate
from mlxroute.serving import AnswerRequest, AnswerScheduler
from mlxroute.statistics import intervals
from mlxroute.types import LargeContext, LargeToken, Message, RunStats, Token, Uploads

WINDOW_S = 60.0
# Calls of 34 steps leave few tokens a minute, and an answer's first ones escalate more often.
ROUTED_WINDOW_S = 180.0
CALL_STEPS = 34
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


@dataclass
class TimerCall:
    """A call that is ready at a set time."""

    token: LargeToken
    ready_s: float

    @property
    def ready(self) -> bool:
        return time.perf_counter() >= self.ready_s

    finished = ready

    def result(self) -> tuple[LargeToken, ...]:
        return (self.token,)

    def cancel(self) -> None:
        pass


class TimerLarge:
    """A large model that answers every call after `call_s` seconds with a frequent word."""

    is_local = False
    max_in_flight = 8
    uploads = Uploads()

    def __init__(self, small: SmallModel, call_s: float) -> None:
        self._ids = small.vocabulary.encode(" the of a is to in and for")
        self._call_s = call_s

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> TimerCall:
        token_id = self._ids[sum(context.token_ids) % len(self._ids)]
        token = LargeToken((token_id,), "", False, -0.1, (), None, None, 1, 100, self._call_s)
        return TimerCall(token, time.perf_counter() + self._call_s)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        end_s = time.perf_counter() + timeout_s
        while not ready() and time.perf_counter() < end_s:
            time.sleep(0.002)


def conversation(prompt: str) -> list[Message]:
    """Return a conversation that asks for a long answer."""
    return [{"role": "user", "content": f"{prompt} Answer at length."}]


def routed() -> EntropyRouter:
    """Return a router that escalates 7 % of the positions."""
    return EntropyRouter(budget=0.07)


def write(
    scheduler: AnswerScheduler, messages: list[Message], router: Router, max_tokens: int
) -> tuple[RunStats, list[float]]:
    """Write an answer; return its figures, and the times of its tokens since the request."""
    began_s = time.perf_counter()
    options = Options(max_tokens=max_tokens, timeout_s=600.0)
    answer = scheduler.submit(AnswerRequest(messages, router, options))
    times_s = [time.perf_counter() - began_s for e in answer.events() if isinstance(e, Token)]
    stats = answer.stats
    assert stats is not None
    return stats, times_s


def measure_alone(small: SmallModel, prompts: list[str], max_tokens: int, rounds: int) -> Any:
    """Compare the median seconds per token, in turns with the same prompt."""
    plain, ratios = small.with_own_cache(), []
    with AnswerScheduler(small, None) as scheduler:
        for _ in range(rounds):
            messages = conversation(prompts[0])
            answer = generate(plain, None, messages, router=never_escalate(), max_tokens=max_tokens)
            before = [time.perf_counter() for _ in answer]
            _, times_s = write(scheduler, messages, never_escalate(), max_tokens)
            # The first tokens come with the prompt and with the copy of its KV cache.
            steps = [statistics.median(intervals(times[2:])) for times in (before, times_s)]
            ratios.append(steps[0] / steps[1])
            print(f"generate {steps[0] * 1e3:.1f} ms, scheduler {steps[1] * 1e3:.1f} ms a token")
    return {"speed_over_generate": round(statistics.median(ratios), 3)}


def receive_tokens(
    scheduler: AnswerScheduler,
    prompts: Sequence[str],
    new_router: Callable[[], Router],
    max_tokens: int,
    *,
    clients: int,
    window_s: float,
) -> list[Token]:
    """Return what clients get in a window; each asks the next prompt as soon as it is answered."""
    end_s = time.perf_counter() + window_s
    waiting = itertools.cycle(prompts)
    received: list[Token] = []

    def ask_again(_: int) -> None:
        while time.perf_counter() < end_s:
            options = Options(max_tokens=max_tokens, timeout_s=600.0)
            request = AnswerRequest(conversation(next(waiting)), new_router(), options)
            answer = scheduler.submit(request)
            for event in answer.events():
                if time.perf_counter() >= end_s:
                    answer.cancel()
                    break
                if isinstance(event, Token):
                    received.append(event)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask_again, range(clients)))
    return received


def measure_together(
    small: SmallModel, prompts: list[str], max_tokens: int, rounds: int, clients: tuple[int, ...]
) -> Any:
    """Compare tokens per second, prompts included, in turns with one client."""
    ratios: dict[int, list[float]] = {number: [] for number in clients}
    for _ in range(rounds):
        speeds = {}
        for number in (1, *clients):
            with AnswerScheduler(small, None) as scheduler:
                received = receive_tokens(
                    scheduler,
                    prompts,
                    never_escalate,
                    max_tokens,
                    clients=number,
                    window_s=WINDOW_S,
                )
            speeds[number] = len(received) / WINDOW_S
            print(f"{number} at a time: {speeds[number]:.2f} tokens/s", flush=True)
        for number in clients:
            ratios[number].append(speeds[number] / speeds[1])
    return {number: round(statistics.median(values), 2) for number, values in ratios.items()}


def measure_routed(small: SmallModel, prompts: list[str], max_tokens: int, rounds: int) -> Any:
    """Compare tokens per second of 4 clients with one, in turns."""
    step_s = median_step_s(small.with_own_cache(), [5, 6, 7])
    large: LargeProtocol = TimerLarge(small, CALL_STEPS * step_s)
    ratios = []
    for _ in range(rounds):
        speeds = []
        for clients in (1, 4):
            with AnswerScheduler(small, large) as scheduler:
                received = receive_tokens(
                    scheduler,
                    prompts,
                    routed,
                    max_tokens,
                    clients=clients,
                    window_s=ROUTED_WINDOW_S,
                )
            speeds.append(len(received) / ROUTED_WINDOW_S)
            rate = sum(token.escalation is not None for token in received) / len(received)
            print(f"{clients} clients: {speeds[-1]:.2f} tokens/s, {rate:.1%} escalated", flush=True)
        ratios.append(speeds[1] / speeds[0])
    return {"4 over 1": round(statistics.median(ratios), 2)}


def measure_second_turn(small: SmallModel, rounds: int) -> Any:
    """Compare the seconds to the first token."""
    ratios = []
    with AnswerScheduler(small, None) as scheduler:
        for number in range(rounds):
            text = " ".join(WORDS[(7 * i + number) % len(WORDS)] for i in range(1_700))
            messages = [{"role": "user", "content": f"{number} {text}"}]
            first, _ = write(scheduler, messages, never_escalate(), 4)
            messages.append({"role": "assistant", "content": first.text})
            messages.append({"role": "user", "content": "And now say it shorter, please."})
            second, second_s = write(scheduler, messages, never_escalate(), 4)
            short = f"{number + 2} and {number + 5}: tell me, in a few words, what they add up to."
            _, short_s = write(
                scheduler, [{"role": "system", "content": short}], never_escalate(), 4
            )
            ratios.append(second_s[0] / short_s[0])
            print(
                f"{second.prompt_tokens} tokens, {second.cached_prompt_tokens} of them cached:"
                f" {second_s[0]:.2f} s; a new short prompt: {short_s[0]:.2f} s",
                flush=True,
            )
    return {"second_over_short": round(statistics.median(ratios), 2)}


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("alone", "together", "routed", "second-turn"))
    parser.add_argument("small", nargs="?", default="qwen2.5-coder-0.5b", metavar="SMALL")
    parser.add_argument("tokens", type=int, nargs="?", default=48, metavar="TOKENS")
    parser.add_argument("rounds", type=int, nargs="?", default=2, metavar="ROUNDS")
    given = parser.parse_args()
    small = SmallModel.load(given.small)
    prompts = read_builtin_prompts()
    sizes = given.tokens, given.rounds
    match given.kind:
        case "alone":
            report = measure_alone(small, prompts, *sizes)
        case "together":
            report = measure_together(small, prompts, *sizes, clients=(4, 8))
        case "routed":
            report = measure_routed(small, prompts[:8], *sizes)
        case _:
            report = measure_second_turn(small, given.rounds)
    print(json.dumps({"measurement": given.kind, "small": given.small, "result": report}))


if __name__ == "__main__":
    main()
