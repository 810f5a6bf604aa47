"""Write the accuracy tables of docs/benchmarks.md from the reports in bench/results/.

    python bench/quality_tables.py

A table stands between `<!-- table: REPORT.json -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"
_TABLE = re.compile(r"(<!-- table: (\S+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_tables(text: str, results: Path = RESULTS) -> str:
    """Return a document with the present tables between its markers."""

    def table(match: re.Match[str]) -> str:
        report = json.loads((results / match[2]).read_text(encoding="utf-8"))
        return match[1] + quality_table(report) + match[3]

    return _TABLE.sub(table, text)


def quality_table(report: Mapping[str, Any]) -> str:
    """Return a report of `bench quality` as a Markdown table, a row for each side."""
    count = report["questions"]
    better = {item["first"]: item for item in report["comparisons"]}
    lines = [
        "| side | large tokens a question | of all | right, % | of the gap, % | in form, % |"
        " against |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in report["sides"].items():
        lenient, strict = side["lenient"], side["strict"]
        gap = "" if side["router"] is None else f"{100 * lenient['gap_recovered']:.0f}"
        cells = (
            name,
            f"{side['large_tokens_per_question']:.2f}",
            f"{100 * side['escalation_rate']:.1f} %",
            _share(lenient["accuracy"], lenient["interval"]),
            gap,
            f"{100 * (1 - strict['no_answer'] / count):.0f}",
            _comparison(better[name]) if name in better else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _comparison(item: Mapping[str, Any]) -> str:
    marks = item["lenient"]
    p = f"{marks['p']:.2g}" if marks["p"] >= 0.0001 else "< 0.0001"
    return f"`{item['second']}`: {100 * marks['difference']:+.1f}, p {'' if '<' in p else '= '}{p}"


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def main() -> None:
    """Rewrite the tables."""
    DOCUMENT.write_text(write_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
