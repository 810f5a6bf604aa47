"""Draw the plots of docs/benchmarks.md from the reports in bench/results/.

    python bench/plots.py

`mlxroute bench quality --plot FILE` and `bench latency --plot FILE` draw the same for a new report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from mlxroute.bench.plot import draw_latency, draw_quality

ROOT = Path(__file__).parent.parent
PLOTS: dict[str, tuple[str, Callable[[Mapping[str, Any], Path], None]]] = {
    "accuracy-csqa-examples.svg": (
        "quality-qwen2.5-coder-0.5b-csqa-test-examples.json",
        draw_quality,
    ),
    "accuracy-csqa-oracles.svg": (
        "quality-qwen2.5-coder-0.5b-csqa-test-oracles.json",
        draw_quality,
    ),
    "speed-of-modes.svg": (
        "latency-qwen2.5-coder-0.5b-gsm8k-test-constant-played.json",
        draw_latency,
    ),
}


def main() -> None:
    """Draw every plot to docs/images/; the same report gives the same file."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # No date in the files.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mlxroute"})
    for name, (report_name, draw) in PLOTS.items():
        report = json.loads((ROOT / "bench" / "results" / report_name).read_text(encoding="utf-8"))
        file = ROOT / "docs" / "images" / name
        draw(report, file)
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
