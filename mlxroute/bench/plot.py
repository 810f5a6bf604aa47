"""Plots of the reports of `bench latency` and `bench quality`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxroute.bench.quality import ORACLES
from mlxroute.errors import UsageError


def check_plot(path: Path) -> None:
    """Raise UsageError if no plot can be written to `path`. Call it before a long measurement."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a plot needs matplotlib; install mlxroute[plot]", parameter="plot")
    if not path.parent.is_dir():
        raise UsageError(f"the plot {path} needs an existing folder", parameter="plot")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds or path.is_dir():
        raise UsageError(
            f"the plot {path} needs a name that ends in one of {', '.join(sorted(kinds))}",
            parameter="plot",
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
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
    """Plot accuracy over escalation rate: one line per router, and each model alone."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    sides = report["sides"]
    for router in sorted({side["router"] for side in sides.values() if side["router"]}):
        points = sorted(
            (side["escalation_rate"], side["lenient"]["accuracy"], *side["lenient"]["interval"])
            for side in sides.values()
            if side["router"] == router
        )
        rates, accuracies, low, high = zip(*points, strict=True)
        panel.plot(rates, accuracies, marker="o", label=router)
        panel.fill_between(rates, low, high, alpha=0.15)
    for name, marker in zip(ORACLES, "s^", strict=True):
        if oracle_points := report.get("oracles", {}).get(name):
            points = sorted(
                (point["escalation_rate"], point["accuracy"]) for point in oracle_points
            )
            label = f"oracle: {name.replace('_', ' ')}"
            panel.plot(*zip(*points, strict=True), color="grey", marker=marker, label=label)
    for name, style in (("small", ":"), ("large", "--")):
        panel.axhline(
            sides[name]["lenient"]["accuracy"], color="grey", linestyle=style, label=f"{name} alone"
        )
    panel.set(xlabel="tokens escalated", ylabel="right answers", xlim=(0, None), ylim=(0, 1))
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.legend(fontsize="small")
    figure.suptitle(f"{_models(report)}, {report['questions']} questions", fontsize="medium")
    figure.savefig(path, dpi=120)


def _models(report: Mapping[str, Any]) -> str:
    return f"{report['small']} with {report['large'].removesuffix('.gguf')}"


def _line_of(mode: str) -> dict[str, Any]:
    """Return colour and dashes: the colour tells the mode, the dashes its options."""
    name = mode.split("+")[0].split(",")[0]
    colours = {"wait": "C0", "overlap": "C1", "hedge": "C2", "auto": "black"}
    style = "--" if "," in mode else "-" if "+" in mode or name == "auto" else ":"
    return {"color": colours.get(name), "linestyle": style}
