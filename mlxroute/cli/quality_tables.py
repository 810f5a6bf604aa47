"""The tables of `bench quality`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mlxroute.cli.terminal import make_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# A larger share of cut-off answers gives a warning.
_CUT_OFF_SHARE: Final = 0.05
# So does a smaller share of answers of the large model in the requested form.
_IN_FORM_SHARE: Final = 0.9


def print_quality(report: dict[str, Any], err: Console) -> None:
    """Print the report as tables, and warnings of answers that were cut off or in another form."""
    err.print(_sides_table(report))
    if report["comparisons"]:
        err.print(_comparisons_table(report["comparisons"]))
    sides, count = report["sides"], report["questions"]
    cut_off = max(side["reached_limit"] for side in sides.values())
    if cut_off > _CUT_OFF_SHARE * count:
        err.print(
            f"up to {cut_off} of {count} answers of a side were cut off at"
            f" {report['tokens']} tokens, and answers that are incomplete by then count as"
            " wrong; raise --tokens",
            style="yellow",
        )
    in_form = count - sides["large"]["strict"]["no_answer"]
    if in_form < _IN_FORM_SHARE * count:
        err.print(
            f"the large model gave {in_form} of {count} answers in the requested form, so the"
            " strict marks say little; give worked examples with --examples",
            style="yellow",
        )


def _sides_table(report: Mapping[str, Any]) -> Table:
    """Return the table of all sides and oracles; costs are means a question, seconds a median."""
    from mlxroute.bench.quality.sides import ORACLES

    count = report["questions"]
    title = f"{count} questions, {report['form']}"
    columns = (
        *("side", "strict", "in form", "lenient, 95 %", "gap recovered, 95 %"),
        *("large tokens", "calls", "uploaded", "seconds"),
    )
    table = make_table(*columns, title=title)
    for name, side in report["sides"].items():
        strict, lenient = side["strict"], side["lenient"]
        table.add_row(
            name,
            f"{strict['accuracy']:.1%}",
            f"{1 - strict['no_answer'] / count:.0%}",
            _share(lenient["accuracy"], lenient["interval"]),
            _share(lenient["gap_recovered"], lenient["gap_interval"]) if side["router"] else "",
            f"{side['large_tokens_per_question']:.2f}",
            f"{side['calls'] / count:.2f}",
            f"{side['uploaded_tokens'] / count:.0f}",
            f"{side['seconds_median']:.1f}",
        )
    for key, label in ORACLES.items():
        for point in report.get("oracles", {}).get(key, ()):
            table.add_row(
                f"{label} {100 * point['budget']:g}%",
                "",
                "",
                f"{point['accuracy']:.1%}",
                "",
                f"{point['large_tokens_per_question']:.2f}",
            )
    return table


def _comparisons_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of McNemar's tests, by lenient marks."""
    columns = ("side", "against", "right: only it", "only the other", "difference, 95 %", "p")
    table = make_table(*columns, title="paired comparisons (McNemar, lenient)")
    for item in comparisons:
        lenient = item["lenient"]
        table.add_row(
            item["first"],
            item["second"],
            str(lenient["only_first"]),
            str(lenient["only_second"]),
            _share(lenient["difference"], lenient["interval"]),
            f"{lenient['p']:.2g}",
        )
    return table


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    """Return a share in per cent with its interval; empty without a value."""
    if value is None:
        return ""
    bounds = f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f}" if interval else "unbounded"
    return f"{value:.1%} ({bounds})"
