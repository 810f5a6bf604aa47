"""Compare `auto` with the fixed modes where the large model's server shares this machine.

Start a server first, then run this script with its address:

    python bench/shared_machine.py http://127.0.0.1:8081/v1 [ROUNDS [TOKENS [MODE ...]]]

Each round answers every prompt in `auto` and in every fixed mode (or those named), in an order that
rotates. The experience of `auto` lasts for the whole run, as in a chat. Prints JSON: tokens per
second of each answer, the ratio of `auto` to the fixed mode of the best median, and the steps that
took three times a quiet step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time

from mlxroute import EntropyRouter, LargeModel, SmallModel, generate
from mlxroute.engine import Experience
from mlxroute.statistics import intervals

PROMPTS = (
    "Explain the difference between a list and a tuple in Python in two sentences.",
    "Why is the sky blue? Answer in two sentences.",
    "How does a bicycle stay upright? Answer in two sentences.",
)
FIXED_MODES = ("wait", "overlap", "hedge")
SLOW_STEP = 3.0


def answer(
    small: SmallModel,
    large: LargeModel,
    prompt: str,
    mode: str,
    *,
    experience: Experience | None,
    max_tokens: int,
) -> tuple[float, list[float]]:
    """Answer in one mode; return tokens per second and the seconds between tokens."""
    run = generate(
        small,
        large,
        prompt,
        router=EntropyRouter(budget=0.07),
        mode=mode,
        max_tokens=max_tokens,
        experience=experience,
    )
    times_s = [time.perf_counter() for _ in run]
    return run.stats().tokens_per_s, intervals(times_s)


def main() -> None:
    """Measure all modes in turns and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", metavar="URL", help="server of the large model")
    parser.add_argument("rounds", type=int, nargs="?", default=5, metavar="ROUNDS")
    parser.add_argument("tokens", type=int, nargs="?", default=48, metavar="TOKENS")
    parser.add_argument("modes", nargs="*", default=[*FIXED_MODES], metavar="MODE")
    given = parser.parse_args()
    if not set(given.modes) <= set(FIXED_MODES):
        parser.error(f"a MODE is one of {', '.join(FIXED_MODES)}")
    address, rounds, max_tokens = given.address, given.rounds, given.tokens
    small = SmallModel.load("qwen2.5-coder-0.5b")
    experience = Experience()
    modes = [*given.modes, "auto"]
    rows = []
    with LargeModel(address) as large:
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        answer(small, large, PROMPTS[0], "wait", experience=None, max_tokens=max_tokens)
        for number, prompt in itertools.product(range(rounds), PROMPTS):
            row = {}
            for mode in modes:
                row[mode], gaps_s = answer(
                    small,
                    large,
                    prompt,
                    mode,
                    experience=experience if mode == "auto" else None,
                    max_tokens=max_tokens,
                )
                if mode == "auto":
                    slow_s = SLOW_STEP * experience.step_s.value
                    row["slowed_steps"] = sum(gap_s > slow_s for gap_s in gaps_s)
                    row["longest_gap_s"] = max(gaps_s)
            modes.append(modes.pop(0))
            rows.append(row)
            print(number, row, file=sys.stderr)
    medians = {mode: statistics.median(row[mode] for row in rows) for mode in modes}
    best = max(given.modes, key=lambda mode: medians[mode])
    report = {
        "command": " ".join(["python", "bench/shared_machine.py", *sys.argv[1:]]),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
        "answers": [{key: round(value, 3) for key, value in row.items()} for row in rows],
        "median_tokens_per_s": {mode: round(value, 2) for mode, value in medians.items()},
        "best_fixed_mode": best,
        "auto_over_best": round(statistics.median(row["auto"] / row[best] for row in rows), 3),
        "first_auto_over_best": round(rows[0]["auto"] / rows[0][best], 3),
        "cores_of_a_step": round(experience.step_cores.value, 2),
        "busy_cores_during_calls": round(experience.busy_cores.value, 2),
        "pauses_after_slowed_steps": experience.pauses,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
