"""Compare `auto` with `wait` where the large model's server shares this machine.

Start a server first, then run this script with its address:

    python bench/shared_machine.py http://127.0.0.1:8081/v1

Prints one line of JSON: for each answer, tokens per second of both modes and auto's longest step.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time

from mlxroute import EntropyRouter, LargeModel, SmallModel, generate
from mlxroute.engine import Experience

PROMPTS = (
    "Explain the difference between a list and a tuple in Python in two sentences.",
    "Why is the sky blue? Answer in two sentences.",
    "How does a bicycle stay upright? Answer in two sentences.",
)
ROUNDS = 2


def answer(
    small: SmallModel, large: LargeModel, prompt: str, experience: Experience | None
) -> tuple[float, float]:
    """Answer in `auto` with its experience, else in `wait`; return tokens/s and longest step."""
    run = generate(
        small,
        large,
        prompt,
        router=EntropyRouter(budget=0.07),
        mode="wait" if experience is None else "auto",
        prefetch=0 if experience is None else None,
        max_tokens=48,
        experience=experience,
    )
    times_s = [time.perf_counter() for _ in run]
    steps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    return run.stats().tokens_per_s, max(steps_s)


def main() -> None:
    """Measure both modes in turns and print the report."""
    small = SmallModel.load("qwen2.5-coder-0.5b")
    experience = Experience()
    rows = []
    with LargeModel(sys.argv[1]) as large:
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        answer(small, large, PROMPTS[0], None)
        for number in range(ROUNDS):
            for prompt in PROMPTS:
                modes = [None, experience] if number % 2 == 0 else [experience, None]
                figures = {mode is None: answer(small, large, prompt, mode) for mode in modes}
                (wait, _), (auto, longest_s) = figures[True], figures[False]
                rows.append(
                    {
                        "wait_tokens_per_s": round(wait, 2),
                        "auto_over_wait": round(auto / wait, 3),
                        "longest_step_s": round(longest_s, 2),
                    }
                )
    report = {
        "answers": rows,
        "median": round(statistics.median(row["auto_over_wait"] for row in rows), 3),
        "busy_cores_during_calls": round(experience.busy_cores.value, 2),
        "stopped_after_a_slowed_step": experience.was_slowed,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
