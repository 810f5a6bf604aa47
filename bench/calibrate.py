"""How the catalogue's thresholds were found.

Answers questions with the small model alone (greedy, through its chat template, no worked
examples) and takes the entropy that a wanted share of the positions exceeds. It is a first
estimate: once large tokens enter an answer, the small model's later entropies change a little.

    python bench/calibrate.py --small qwen2.5-coder-0.5b --data csqa.jsonl --data gsm8k.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
from collections.abc import Iterator
from pathlib import Path

from mlxroute import EntropyRouter, SmallModel, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--rate", type=float, default=0.07, help="share of positions to escalate")
    parser.add_argument("--questions", type=int, default=12, help="per data file")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cache-dir", type=Path)
    options = parser.parse_args()

    small = SmallModel.load(options.small, cache_dir=options.cache_dir)
    found: dict[str, list[float]] = {}
    for file in options.data:
        found[file.parent.name] = [
            token.score
            for question in _questions(file, options.questions)
            for token in generate(
                small,
                None,
                question,
                router=EntropyRouter(math.inf),
                max_tokens=options.max_tokens,
            )
        ]
    every = [score for scores in found.values() for score in scores]
    report = {
        "small": options.small,
        "rate": options.rate,
        "threshold_nats": round(_exceeded_by(options.rate, every), 3),
        "per_data_set": {
            name: {
                "positions": len(scores),
                "threshold_nats": round(_exceeded_by(options.rate, scores), 3),
            }
            for name, scores in found.items()
        },
        "questions_per_data_set": options.questions,
        "max_tokens": options.max_tokens,
        "machine": f"{platform.system()} {platform.machine()}, {platform.python_version()}",
    }
    print(json.dumps(report))


def _questions(file: Path, count: int) -> Iterator[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    for line in random.Random(0).sample(lines, count):
        item = json.loads(line)
        yield item.get("prompt") or item["problem"]


def _exceeded_by(share: float, scores: list[float]) -> float:
    """The score that `share` of the positions exceed."""
    ordered = sorted(scores, reverse=True)
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]


if __name__ == "__main__":
    main()
