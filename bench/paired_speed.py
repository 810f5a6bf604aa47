"""Never-escalating mlxroute beside `mlx_lm.stream_generate`, in turns, on the same weights.

python bench/paired_speed.py --small smollm2-135m --pairs 5
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxroute import EntropyRouter, SmallModel, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache-dir", type=Path)
    options = parser.parse_args()

    prompts = [
        json.loads(line)["prompt"]
        for line in (Path(__file__).parent / "prompts" / "varied.jsonl").read_text().splitlines()
    ]
    # Prompts whose answers are long; the first run of each side warms up and is not counted.
    chosen = [prompts[i] for i in (0, 14, 9, 1, 17, 10)][: options.pairs + 1]
    small = SmallModel.load(options.small, cache_dir=options.cache_dir)
    ours, theirs = [], []
    for prompt in chosen:
        ours.append(_mlxroute(small, prompt, options.tokens))
        theirs.append(_mlx_lm(small, prompt, options.tokens))
    pairs = list(zip(ours, theirs, strict=True))[1:]
    report = {
        "small": options.small,
        "pairs": len(pairs),
        "tokens": [pair[0]["tokens"] for pair in pairs],
        "same_text": all(pair[0]["text"] == pair[1]["text"] for pair in pairs),
        "ratio_tokens_per_s": _spread([a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]),
        "ratio_ttft": _spread([a["ttft_s"] / b["ttft_s"] for a, b in pairs]),
        "mlxroute": _medians([pair[0] for pair in pairs]),
        "mlx_lm": _medians([pair[1] for pair in pairs]),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("mlxroute", "mlx", "mlx-lm")},
    }
    print(json.dumps(report))


def _mlxroute(small: SmallModel, prompt: str, count: int) -> dict[str, Any]:
    _fresh(small)
    answer = generate(small, None, prompt, router=EntropyRouter(math.inf), max_tokens=count)
    for _ in answer:
        pass
    stats = answer.stats()
    return {
        "text": stats.text,
        "tokens": stats.tokens,
        "tokens_per_s": stats.tokens_per_s,
        "ttft_s": stats.ttft_s,
        "peak_gb": _peak_gb(),
    }


def _mlx_lm(small: SmallModel, prompt: str, count: int) -> dict[str, Any]:
    from mlx_lm import stream_generate

    _fresh(small)
    ids = small.encode_prompt(small.render([{"role": "user", "content": prompt}]))
    times, text = [], ""
    began = time.perf_counter()
    for reply in stream_generate(small.model, small.tokenizer, ids, max_tokens=count):
        times.append(time.perf_counter())
        text += reply.text
    return {
        "text": text,
        "tokens": len(times),
        "tokens_per_s": (len(times) - 1) / (times[-1] - times[0]),
        "ttft_s": times[0] - began,
        "peak_gb": _peak_gb(),
    }


def _fresh(small: SmallModel) -> None:
    """No reused prompt, no memory of the run before."""
    import mlx.core as mx

    small.rollback(len(small.cached_ids))
    mx.clear_cache()
    mx.reset_peak_memory()


def _peak_gb() -> float:
    import mlx.core as mx

    return mx.get_peak_memory() / 1e9


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("tokens_per_s", "ttft_s", "peak_gb")
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in keys}


if __name__ == "__main__":
    main()
