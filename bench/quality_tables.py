"""Write the accuracy tables of docs/benchmarks.md from the reports in bench/results/.

    python bench/quality_tables.py

A table stands between `<!-- table: REPORT.json -->` and `<!-- end -->`. A second report, as in
`<!-- table: REPORT.json ADAPTED.json -->`, is of the same questions with an adapter. Its sides
follow, and each is compared with the same side without the adapter. Between
`<!-- sets: REPORT.json ... -->` and `<!-- end -->` stand the sides of one report a set that are
routed by entropy or a head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlxroute.bench.plot import merit
from mlxroute.statistics import mcnemar_p

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"
SHOWN_ROUTERS = ("entropy", "head")
"""The routers in the table and the picture of sets."""
_SETS = re.compile(r"(<!-- sets: ((?:\S+\.json )+)-->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table: (\S+\.json)(?: (\S+\.json))? -->\n).*?(<!-- end -->)", re.DOTALL)


def read_report(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """Return a report by the name of its file."""
    report: dict[str, Any] = json.loads((results / name).read_text(encoding="utf-8"))
    return report


def write_tables(text: str, results: Path = RESULTS) -> str:
    """Return a document with the present tables between its markers."""
    read = partial(read_report, results=results)

    def table(match: re.Match[str]) -> str:
        adapted = read(match[3]) if match[3] else None
        return match[1] + quality_table(read(match[2]), adapted) + match[4]

    def sets(match: re.Match[str]) -> str:
        names = match[2].split()
        return match[1] + sets_table({name: read(name) for name in names}) + match[3]

    return _SETS.sub(sets, _TABLE.sub(table, text))


def sets_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the routed sides of reports as a Markdown table; `reports` are by file name.

    The merit of a set without right answers is the F1 score with the large model's answers.
    """
    lines = [
        "| set | questions | small | large | routed | large tokens a question | of all | right, % |"
        " of the gap, % | against small | report |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for file, report in reports.items():
        sides = report["sides"]
        low, high = (merit(sides[end])[0] for end in ("small", "large"))
        start = [report["data"], str(report["questions"]), f"{100 * low:.1f}", f"{100 * high:.1f}"]
        link = f"[report](../bench/results/{file})"
        for name, side in sides.items():
            if side["router"] not in SHOWN_ROUTERS:
                continue
            value, *interval = merit(side)
            p = _p_against_small(report, name)
            cells = (
                *start,
                name,
                f"{side['large_tokens_per_question']:.2f}",
                f"{100 * side['escalation_rate']:.1f} %",
                _share(value, (interval[0], interval[1])),
                _share_of_gap(value, low, high),
                f"{100 * (value - low):+.1f}, p {_p_text(p)}",
                link,
            )
            lines.append(f"| {' | '.join(cells)} |")
            start, link = [""] * 4, ""
    return "\n".join(lines) + "\n"


def _share_of_gap(value: float, low: float, high: float) -> str:
    """Return the share of the gap from small to large model in percent; empty if there is none."""
    return f"{100 * (value - low) / (high - low):.0f}" if high > low else ""


def _p_against_small(report: Mapping[str, Any], name: str) -> float:
    """Return the p value of a side against the small model alone.

    Without right answers the report has it if `--compare` named the two sides.
    """
    marks = report["sides"][name]["lenient"]
    if marks is not None:
        return float(marks["p_against_small"])
    pairs = {(item["first"], item["second"]): item for item in report["comparisons"]}
    return float(pairs[name, "small"]["with_large"]["p"])


def quality_table(report: Mapping[str, Any], adapted: Mapping[str, Any] | None = None) -> str:
    """Return a report of `bench quality` as a Markdown table, a row for each side.

    `adapted` is a report of the same questions with an adapter. The gap is that of the models
    without it.
    """
    sides, count = report["sides"], report["questions"]
    better = {item["first"]: item for item in report["comparisons"]}
    lines = [
        "| side | large tokens a question | of all | right, % | of the gap, % | in form, % |"
        " against |",
        "|---|---|---|---|---|---|---|",
    ]

    def add(name: str, side: Mapping[str, Any], against: str) -> None:
        lenient, ends = side["lenient"], [sides[end]["lenient"] for end in ("small", "large")]
        low, high = (end["accuracy"] for end in ends)
        is_alone = any(lenient is end for end in ends)
        cells = (
            name,
            f"{side['large_tokens_per_question']:.2f}",
            f"{100 * side['escalation_rate']:.1f} %",
            _share(lenient["accuracy"], lenient["interval"]),
            _share_of_gap(lenient["accuracy"], low, high) if not is_alone else "",
            f"{100 * (1 - side['strict']['no_answer'] / count):.0f}",
            against,
        )
        lines.append(f"| {' | '.join(cells)} |")

    for name, side in sides.items():
        add(name, side, _comparison(better[name]) if name in better else "")
    if adapted:
        for name, side in adapted["sides"].items():
            if name != "large":
                add(f"adapted, {name}", side, _compare_adapted(name, adapted, sides))
    return "\n".join(lines) + "\n"


def _compare_adapted(
    name: str, adapted: Mapping[str, Any], unadapted: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return McNemar's test of a side against the same one without the adapter.

    If there is none, the test is against another side of its own report, if that compares them.
    """
    side = adapted["sides"][name]
    if name not in unadapted:
        for item in adapted["comparisons"]:
            if item["first"] == name and item["second"] in adapted["sides"]:
                return _comparison({**item, "second": f"adapted, {item['second']}"})
        return ""
    pairs = list(zip(side["lenient"]["right"], unadapted[name]["lenient"]["right"], strict=True))
    gained, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    marks = {"difference": (gained - lost) / len(pairs), "p": mcnemar_p(gained, lost)}
    return _comparison({"second": name, "lenient": marks})


def _comparison(item: Mapping[str, Any]) -> str:
    marks = item["lenient"]
    return f"`{item['second']}`: {100 * marks['difference']:+.1f}, p {_p_text(marks['p'])}"


def _p_text(p: float) -> str:
    return f"= {p:.2g}" if p >= 0.0001 else "< 0.0001"


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def main() -> None:
    """Rewrite the tables."""
    DOCUMENT.write_text(write_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
