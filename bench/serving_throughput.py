"""Measure answers written at a time against one: tokens per second, and the second turn of a chat.

    python bench/serving_throughput.py alone|together|routed|second-turn [SMALL] [TOKENS] [ROUNDS]

- `alone`: seconds per token of the scheduler with one answer against those of `generate`, in turns.
- `together`: tokens per second of 4 and of 8 answers over those of one, never escalating.
- `routed`: the same for 4 answers at a budget of 7 %, with calls of 34 steps. The large model is a
  timer whose tokens never agree; answers follow each other, as those of clients that ask again.
- `second-turn`: seconds to the first token in the second turn of a chat of 2,000 tokens, over those
  of a new prompt of some 50 tokens.

Prints a line per measurement and JSON at the end.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxroute import EntropyRouter, SmallModel, generate
from mlxroute.engine import Options
from mlxroute.engine.protocols import LargeProtocol
from mlxroute.serving import AnswerRequest, AnswerScheduler
from mlxroute.types import LargeContext, LargeToken, Message, RunStats, Token, Uploads

PROMPTS = Path(__file__).parent / "prompts" / "varied.jsonl"
CALL_STEPS = 34
ROUTED_ANSWERS = 12
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


def never() -> EntropyRouter:
    """Return a router that never escalates."""
    return EntropyRouter(threshold=math.inf)


def routed() -> EntropyRouter:
    """Return a router that escalates 7 % of the positions."""
    return EntropyRouter(budget=0.07)


def write(
    scheduler: AnswerScheduler, messages: list[Message], router: EntropyRouter, count: int
) -> tuple[RunStats, list[float]]:
    """Write an answer; return its figures, and the times of its tokens since the request."""
    began_s = time.perf_counter()
    options = Options(max_tokens=count, timeout_s=600.0)
    answer = scheduler.submit(AnswerRequest(messages, router, options))
    times_s = [time.perf_counter() - began_s for e in answer.events() if isinstance(e, Token)]
    run = answer.stats().run
    assert run is not None
    return run, times_s


def write_all(
    scheduler: AnswerScheduler,
    prompts: Sequence[str],
    new_router: Callable[[], EntropyRouter],
    count: int,
    *,
    clients: int,
) -> list[RunStats]:
    """Write an answer to each prompt, `clients` at a time; return their figures."""

    def ask(prompt: str) -> RunStats:
        return write(scheduler, conversation(prompt), new_router(), count)[0]

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, prompts))


def measure_alone(small: SmallModel, prompts: list[str], count: int, rounds: int) -> Any:
    """Compare the median seconds per token, in turns with the same prompt."""
    plain, ratios = small.with_own_cache(), []
    with AnswerScheduler(small, None) as scheduler:
        for _ in range(rounds):
            messages = conversation(prompts[0])
            answer = generate(plain, None, messages, router=never(), max_tokens=count)
            before = [time.perf_counter() for _ in answer]
            _, times_s = write(scheduler, messages, never(), count)
            # The first tokens come with the prompt and with the copy of its KV cache.
            steps = [
                statistics.median(b - a for a, b in itertools.pairwise(times[2:]))
                for times in (before, times_s)
            ]
            ratios.append(steps[0] / steps[1])
            print(f"generate {steps[0] * 1e3:.1f} ms, scheduler {steps[1] * 1e3:.1f} ms a token")
    return {"speed_over_generate": round(statistics.median(ratios), 3)}


def measure_together(
    small: SmallModel, prompts: list[str], count: int, rounds: int, clients: tuple[int, ...]
) -> Any:
    """Compare tokens per second, prompts included, in turns with one answer."""
    ratios: dict[int, list[float]] = {number: [] for number in clients}
    with AnswerScheduler(small, None) as scheduler:
        for _ in range(rounds):
            speeds = {}
            for number in (1, *clients):
                began_s = time.perf_counter()
                runs = write_all(scheduler, prompts[:number], never, count, clients=number)
                speeds[number] = sum(run.tokens for run in runs) / (time.perf_counter() - began_s)
                print(f"{number} at a time: {speeds[number]:.2f} tokens/s", flush=True)
            for number in clients:
                ratios[number].append(speeds[number] / speeds[1])
    return {number: round(statistics.median(values), 2) for number, values in ratios.items()}


def measure_routed(small: SmallModel, prompts: list[str], count: int, rounds: int) -> Any:
    """Compare tokens per second of 4 clients with one, which all ask again when answered."""
    own = small.with_own_cache()
    signals, _ = own.prefill([5, 6, 7])
    times_s = []
    for _ in range(8):
        began_s = time.perf_counter()
        signals = own.step(signals.token_id)
        times_s.append(time.perf_counter() - began_s)
    large: LargeProtocol = TimerLarge(small, CALL_STEPS * statistics.median(times_s))
    ratios = []
    for _ in range(rounds):
        speeds = []
        for clients in (1, 4):
            with AnswerScheduler(small, large) as scheduler:
                began_s = time.perf_counter()
                asked = list(itertools.islice(itertools.cycle(prompts), ROUTED_ANSWERS))
                runs = write_all(scheduler, asked, routed, count, clients=clients)
                tokens = sum(run.tokens for run in runs)
                speeds.append(tokens / (time.perf_counter() - began_s))
                rate = sum(run.escalated for run in runs) / tokens
                print(f"{clients} clients: {speeds[-1]:.2f} tokens/s, {rate:.1%} escalated")
        ratios.append(speeds[1] / speeds[0])
    return {"4 over 1": round(statistics.median(ratios), 2)}


def measure_second_turn(small: SmallModel, prompts: list[str], count: int, rounds: int) -> Any:
    """Compare the seconds to the first token."""
    ratios = []
    with AnswerScheduler(small, None) as scheduler:
        for number in range(rounds):
            text = " ".join(WORDS[(7 * i + number) % len(WORDS)] for i in range(1_700))
            messages = [{"role": "user", "content": f"{number} {text}"}]
            first, _ = write(scheduler, messages, never(), 4)
            messages.append({"role": "assistant", "content": first.text})
            messages.append({"role": "user", "content": "And now say it shorter, please."})
            second, second_s = write(scheduler, messages, never(), 4)
            short = f"{number + 2} and {number + 5}: tell me, in a few words, what they add up to."
            _, short_s = write(scheduler, [{"role": "system", "content": short}], never(), 4)
            ratios.append(second_s[0] / short_s[0])
            print(
                f"{second.prompt_tokens} tokens, {second.cached_prompt_tokens} of them cached:"
                f" {second_s[0]:.2f} s; a new short prompt: {short_s[0]:.2f} s",
                flush=True,
            )
    return {"second_over_short": round(statistics.median(ratios), 2)}


def main() -> None:
    """Run one measurement."""
    kind, name, count, rounds = (
        *sys.argv[1:],
        *("together", "qwen2.5-coder-0.5b", "48", "2")[len(sys.argv) - 1 :],
    )
    small = SmallModel.load(name)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()]
    sizes = int(count), int(rounds)
    match kind:
        case "alone":
            report = measure_alone(small, prompts, *sizes)
        case "together":
            report = measure_together(small, prompts, *sizes, clients=(4, 8))
        case "routed":
            report = measure_routed(small, prompts[:8], *sizes)
        case _:
            report = measure_second_turn(small, prompts, *sizes)
    print(json.dumps({"measurement": kind, "small": name, "result": report}))


if __name__ == "__main__":
    main()
