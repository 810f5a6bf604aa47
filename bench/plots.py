"""Draw the plots of docs/benchmarks.md from the reports in bench/results/.

    python bench/plots.py

`mlxroute bench quality --plot FILE` and `bench latency --plot FILE` draw the same for a new report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from quality_tables import SHOWN_ROUTERS, read_report

from mlxroute.bench.plot import draw_latency, draw_quality, merit

ROOT = Path(__file__).parent.parent
SETS = {
    "CommonsenseQA": "quality-qwen2.5-coder-0.5b-csqa-test-examples.json",
    "GSM8K": "quality-qwen2.5-coder-0.5b-gsm8k-test-examples.json",
    "HumanEval": "quality-qwen2.5-coder-0.5b-humaneval.json",
    "reasoning-gym": "quality-qwen2.5-coder-0.5b-reasoning-gym.json",
    "open prompts (F1)": "quality-qwen2.5-coder-0.5b-questions-open.json",
}
"""The reports of the picture of all sets, by the name of the set."""
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
        file = ROOT / "docs" / "images" / name
        draw(read_report(report_name), file)
        print(file.relative_to(ROOT))
    file = ROOT / "docs" / "images" / "accuracy-sets.svg"
    draw_sets({name: read_report(report_name) for name, report_name in SETS.items()}, file)
    print(file.relative_to(ROOT))


def draw_sets(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot, in a row for each set, both models alone and the sides of `SHOWN_ROUTERS`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 0.8 * len(reports) + 1), layout="constrained")
    panel = figure.subplots()
    colours: dict[str, str] = {}
    for row, report in enumerate(reports.values()):
        sides = report["sides"]
        ends = [merit(sides[name])[0] for name in ("small", "large")]
        panel.plot(ends, (row, row), color="lightgrey", linewidth=6, zorder=0)
        for value, marker, label in zip(ends, "os", ("small alone", "large alone"), strict=True):
            panel.plot(value, row, marker, color="grey", linestyle="", label=None if row else label)
        routed = [side for side in sides.values() if side["router"] in SHOWN_ROUTERS]
        for place, side in enumerate(routed):
            value, low, high = merit(side)
            router = str(side["router"])
            new_label = None if router in colours else router
            colour = colours.setdefault(router, f"C{len(colours)}")
            height = row + 0.5 * ((place + 1) / (len(routed) + 1) - 0.5)
            bounds = [[value - low], [high - value]]
            panel.errorbar(value, height, xerr=bounds, fmt=".", color=colour, label=new_label)
    panel.set_yticks(range(len(reports)), list(reports))
    panel.set(xlabel="right answers, or F1 score", xlim=(0, 1.02), ylim=(len(reports) - 0.5, -0.5))
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
