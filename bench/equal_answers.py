"""Count the answers that are the same in every mode, for one tolerance of `--accept-within`.

Start a server first, then run this script with its address, a tolerance in nats and a file:

    python bench/equal_answers.py http://127.0.0.1:8081/v1 0.2 rows.jsonl [SMALL]

Writes 20 answers of 96 tokens in each mode, with and without prefetch, one row per answer; a file
with rows is continued. Prints JSON: how many answers equal that of `wait` without prefetch, and how
far the large model's logprobs moved at positions before the first difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from mlxroute import EntropyRouter, LargeModel, SmallModel, Token, generate
from mlxroute.cli.bench_report import read_builtin_prompts
from mlxroute.recorded.record_file import append_records, read_records
from mlxroute.statistics import percentile

# `auto` uses one of these at any time.
MODES = ("wait", "overlap", "hedge")
PREFETCH = (0, 16)
ANSWERS, TOKENS = 20, 96
# The server may wait for other work of the machine; a late call would change the answer.
TIMEOUT_S = 1800.0


def describe(token: Token) -> list[Any]:
    """Return id, source and, where escalated, the large model's best tokens with logprobs."""
    large = None if token.escalation is None else token.escalation.large
    top = None if large is None else [[text, round(value, 4)] for text, value in large.top[:3]]
    return [token.token_id, str(token.source), top]


def main() -> None:
    """Write the missing answers and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("address", metavar="URL", help="server of the large model")
    parser.add_argument("tolerance", type=float, metavar="X", help="tolerance in nats, such as 0.2")
    parser.add_argument("file", type=Path, metavar="FILE", help="a file with rows is continued")
    parser.add_argument("small", nargs="?", default="smollm2-135m", metavar="SMALL")
    given = parser.parse_args()
    address, tolerance, path = given.address, given.tolerance, given.file
    small = SmallModel.load(given.small)
    prompts = read_builtin_prompts()
    done = {
        (row["mode"], row["prefetch"], row["prompt"]): row["tokens"]
        for row in read_records(path, dict)
    }
    with LargeModel(address, timeout_s=TIMEOUT_S) as large:
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        # Neighbouring answers have different prompts, so that no cache is warmer than in a chat.
        for mode, prefetch, number in itertools.product(MODES, PREFETCH, range(ANSWERS)):
            if (mode, prefetch, number) in done:
                continue
            answer = generate(
                small,
                large,
                prompts[number],
                router=EntropyRouter(budget=0.07),
                mode=mode,
                prefetch=prefetch,
                max_tokens=TOKENS,
                accept_within=tolerance,
                timeout_s=TIMEOUT_S,
            )
            tokens = [describe(token) for token in answer]
            done[mode, prefetch, number] = tokens
            row = {"mode": mode, "prefetch": prefetch, "prompt": number, "tokens": tokens}
            append_records(path, [row])
    print(json.dumps(compare(done, tolerance)))


def compare(done: dict[tuple[str, int, int], list[Any]], tolerance: float) -> dict[str, Any]:
    """Return the report over all answers."""
    equal: dict[str, int] = {}
    moved: list[float] = []
    same_everywhere = set(range(ANSWERS))
    for (mode, prefetch, number), tokens in done.items():
        base = done["wait", 0, number]
        ids = [token[0] for token in tokens]
        is_equal = ids == [token[0] for token in base]
        name = f"{mode}, prefetch {prefetch}"
        equal[name] = equal.get(name, 0) + is_equal
        if not is_equal:
            same_everywhere.discard(number)
        if tokens is base:
            continue
        for ours, theirs in zip(tokens, base, strict=False):
            if ours[2] and theirs[2]:
                moved.append(abs(_gap(ours[2]) - _gap(theirs[2])))
            if ours[0] != theirs[0]:
                break
    return {
        "accept_within": tolerance,
        "answers": ANSWERS,
        "tokens": TOKENS,
        "equal_to_wait": equal,
        "equal_in_all_modes": len(same_everywhere),
        "moved_gap_nats": {
            "positions": len(moved),
            "share_moved": round(sum(value > 0 for value in moved) / len(moved), 3),
            "median": round(statistics.median(moved), 4),
            "p95": round(percentile(moved, 0.95), 4),
            "max": round(max(moved), 4),
        },
    }


def _gap(top: list[list[Any]]) -> float:
    """Return the nats between the large model's best token and its second."""
    return float(top[0][1] - top[1][1]) if len(top) > 1 else 0.0


if __name__ == "__main__":
    main()
