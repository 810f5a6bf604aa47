"""Plots of the reports of `bench latency` and `bench quality`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxroute.bench.quality.sides import LARGE, ORACLES, SMALL
from mlxroute.errors import UsageError
from mlxroute.replace_file import check_creatable

# Known here, because the first import of matplotlib takes seconds, in which it reads all fonts.
_KINDS = ("eps", "jpeg", "jpg", "pdf", "png", "ps", "svg", "svgz", "tif", "tiff", "webp")


def check_plot(path: Path) -> None:
    """Raise UsageError if no plot can be written to `path`. Call it before a long measurement."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a plot needs matplotlib; `pip install matplotlib`", parameter="plot")
    if not os.path.isdir(path.parent):
        raise UsageError(f"the plot {path} needs an existing folder", parameter="plot")
    if path.suffix[1:].lower() not in _KINDS or os.path.isdir(path):
        raise UsageError(
            f"the plot {path} needs a name that ends in one of {', '.join(_KINDS)}",
            parameter="plot",
        )
    if not os.path.exists(path):
        check_creatable(path, parameter="plot")
    elif not os.access(path, os.W_OK):
        raise UsageError(f"the plot {path} cannot be written there", parameter="plot")


def draw_latency(report: Mapping[str, Any], path: Path) -> None:
    """Plot speed relative to `wait` over call time: one line per mode, one panel per rate."""
    from matplotlib.figure import Figure

    rates = sorted({point["rate"] for point in report["points"]})
    figure = Figure(figsize=(3 * len(rates), 5), layout="constrained")
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=True):
        points = [point for point in report["points"] if point["rate"] == rate]
        points.sort(key=lambda point: float(point["ratio"]))
        for name in points[0]["sides"]:
            panel.plot(
                [point["ratio"] for point in points],
                [point["sides"][name]["over_wait"] for point in points],
                marker=".",
                label=name,
                **_line_of(name),
            )
        ratios = [point["ratio"] for point in points]
        panel.set(title=f"{rate:.0%} escalated", xlabel="call time in steps", xscale="log")
        panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        panel.minorticks_off()
        panel.grid(axis="y", color="lightgrey", linewidth=0.5)
    panels[0].set_ylabel("tokens/s over those of wait")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(rates))
    figure.suptitle(f"{_models(report)}, {report['delay']} call times")
    figure.savefig(path, dpi=120)


def draw_quality(report: Mapping[str, Any], path: Path) -> None:
    """Plot accuracy over large tokens a question: one line per router, and each model alone.

    Without right answers it is the F1 score with the large model's answers.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    sides, questions = report["sides"], report["questions"]
    small = merit(sides["small"])[0]
    for router in sorted({side["router"] for side in sides.values() if side["router"]}):
        points = sorted(
            (_large_tokens(side, side["tokens"] / questions), merit(side))
            for side in sides.values()
            if side["router"] == router
        )
        spent = [tokens for tokens, _ in points]
        accuracies, low, high = zip(*(merit for _, merit in points), strict=True)
        (line,) = panel.plot(spent, accuracies, marker="o", label=router)
        # Every router starts from the small model alone.
        panel.plot((0, spent[0]), (small, accuracies[0]), color=line.get_color(), linestyle=":")
        panel.fill_between(spent, low, high, alpha=0.15)
    for (name, label), marker in zip(ORACLES.items(), "sD^", strict=True):
        if oracle_points := report.get("oracles", {}).get(name):
            large_tokens = sides["large"]["tokens"] / questions
            points = sorted(
                (_large_tokens(point, large_tokens), point["accuracy"]) for point in oracle_points
            )
            panel.plot(*zip(*points, strict=True), color="grey", marker=marker, label=label)
    for name, style in (("small", ":"), ("large", "--")):
        panel.axhline(merit(sides[name])[0], color="grey", linestyle=style, label=f"{name} alone")
    for name, side in sides.items():
        if side["router"] is None and name not in (SMALL.name, LARGE.name):
            panel.axhline(merit(side)[0], color="grey", linestyle="-.", label=name)
    has_answers = sides["large"]["lenient"] is not None
    merit_name = "right answers" if has_answers else "F1 with the large model's answers"
    panel.set(xlabel="large tokens a question", ylabel=merit_name, xlim=(0, None), ylim=(0, 1))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.legend(fontsize="small")
    figure.suptitle(f"{_models(report)}, {questions} questions", fontsize="medium")
    figure.savefig(path, dpi=120)


def merit(side: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the accuracy of a side of `bench quality`, and the bounds of its interval.

    Without right answers it is the F1 score with the large model's answers. All are from 0 to 1.
    """
    marks = side["lenient"]
    if marks is not None:
        return marks["accuracy"], *marks["interval"]
    return side["with_large"]["f1"], *side["with_large"]["interval"]


def _large_tokens(point: Mapping[str, Any], tokens: float) -> float:
    """Return the large tokens a question of a side or an oracle, whose answers have `tokens`.

    Reports of earlier versions have only the share.
    """
    share: float = point["escalation_rate"]
    return float(point.get("large_tokens_per_question", share * tokens))


def _models(report: Mapping[str, Any]) -> str:
    return f"{report['small']} with {report['large'].removesuffix('.gguf')}"


def _line_of(mode: str) -> dict[str, Any]:
    """Return colour and dashes: the colour tells the mode, the dashes its options."""
    name = mode.split("+")[0].split(",")[0]
    colours = {"wait": "C0", "overlap": "C1", "hedge": "C2", "auto": "black"}
    style = "--" if "," in mode else "-" if "+" in mode or name == "auto" else ":"
    return {"color": colours.get(name), "linestyle": style}
