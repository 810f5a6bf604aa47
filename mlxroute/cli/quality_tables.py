"""The tables of `bench quality`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from mlxroute.bench.quality.sides import LARGE, ORACLES, SMALL
from mlxroute.cli.terminal import make_table, print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAX_CUT_OFF_SHARE: Final = 0.05
"""A larger share of cut-off answers gives a warning."""
# So does a smaller share of answers of the large model in the requested form.
_IN_FORM_SHARE: Final = 0.9


def print_quality(report: dict[str, Any], err: Console) -> None:
    """Print the report as tables, and warnings of answers that were cut off or in another form."""
    print_table(err, _sides_table(report))
    if line := _unchecked_line(report["sides"]):
        err.print(line, highlight=False, soft_wrap=True)
    if "oracles" in report:
        print_table(err, _oracles_table(report["oracles"]))
    if report["comparisons"]:
        print_table(err, _comparisons_table(report["comparisons"]))
    sides, count = report["sides"], report["questions"]
    cut_off = max(side["reached_limit"] for side in sides.values())
    strict = sides["large"]["strict"]
    if cut_off > MAX_CUT_OFF_SHARE * count:
        result = (
            "they are judged by what was written"
            if strict
            else "only their beginnings are compared"
        )
        err.print(
            f"up to {cut_off} of {count} answers of a side were cut off at"
            f" {report['tokens']} tokens, and {result}; raise --tokens",
            style="yellow",
        )
    if (unscored := report.get("unscored")) is not None:
        err.print(
            f"the large model's logprobs are missing for {unscored['answers']} of"
            f" {count * len(sides)} answers: {unscored['reason']}",
            style="yellow",
            soft_wrap=True,
        )
    in_form = count - strict["no_answer"] if strict is not None else count
    if in_form < _IN_FORM_SHARE * count:
        err.print(
            f"the large model gave {in_form} of {count} answers in the requested form, so the"
            " strict marks say little; give worked examples with --examples",
            style="yellow",
        )


def _sides_table(report: Mapping[str, Any]) -> Table:
    """Return the table of all sides; costs are means a question, seconds a median."""
    sides, count = report["sides"], report["questions"]
    has_answers = sides["large"]["lenient"] is not None
    has_logprobs = any(side["by_large"] for side in sides.values())
    if has_answers:
        merits: tuple[str, ...] = ("strict", "in\nform", "lenient", "gap\nrecovered")
    else:
        merits = ("F1 with the large\nmodel's answer", "iden-\ntical")
        merits += ("large model's\nlogprob, nats",) if has_logprobs else ()
    columns = ("side", *merits, "large", "calls", "sent", "s")
    title = (
        f"{count} questions, {report['form']}\n"
        "per cent, 95 % intervals; large tokens, calls, sent tokens, seconds a question"
    )
    table = make_table(*columns, title=title)
    for name, side in sides.items():
        table.add_row(
            name,
            *(_marks(name, side, count) if has_answers else _agreement(side, count)),
            *((_logprob(side["by_large"]),) if has_logprobs else ()),
            f"{side['large_tokens_per_question']:.2f}",
            f"{side['calls'] / count:.2f}",
            f"{side['uploaded_tokens'] / count:.0f}",
            f"{side['seconds_median']:.1f}",
        )
    return table


def _unchecked_line(sides: Mapping[str, Any]) -> str:
    """Return the number of unchecked tokens of each side that has some; empty if none has."""
    counts = [f"{side['unchecked']} of {name}" for name, side in sides.items() if side["unchecked"]]
    if not counts:
        return ""
    return f"unchecked tokens (the large model did not continue the answer): {', '.join(counts)}"


def _oracles_table(oracles: Mapping[str, Any]) -> Table:
    """Return the table of oracle routers."""
    table = make_table("oracle", "budget", "right", "large tokens")
    for key, label in ORACLES.items():
        for point in oracles.get(key, ()):
            table.add_row(
                label,
                f"{100 * point['budget']:g}%",
                f"{100 * point['accuracy']:.1f}",
                f"{point['large_tokens_per_question']:.2f}",
            )
    return table


def _marks(name: str, side: Mapping[str, Any], count: int) -> tuple[str, ...]:
    strict, lenient = side["strict"], side["lenient"]
    is_alone = name in (SMALL.name, LARGE.name)
    return (
        f"{100 * strict['accuracy']:.1f}",
        f"{100 * (1 - strict['no_answer'] / count):.0f}",
        _share(lenient["accuracy"], lenient["interval"]),
        "" if is_alone else _share(lenient["gap_recovered"], lenient["gap_interval"]),
    )


def _agreement(side: Mapping[str, Any], count: int) -> tuple[str, ...]:
    with_large = side["with_large"]
    identical = f"{100 * with_large['identical'] / count:.0f}"
    return _share(with_large["f1"], with_large["interval"]), identical


def _logprob(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    low, high = figures["interval"]
    return f"{figures['token_logprob']:.2f} ({low:.1f}..{high:.1f})"


def _comparisons_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of paired tests: McNemar's by lenient marks, else sign tests by F1."""
    has_answers = "lenient" in comparisons[0]
    kind, counts = (
        ("lenient", ("only_first", "only_second"))
        if has_answers
        else ("with_large", ("more_first", "more_second"))
    )
    titles, title = (
        (("right:\nonly it", "only the\nother"), "paired comparisons (McNemar, lenient)")
        if has_answers
        else (("closer:\nit", "the\nother"), "paired comparisons (sign test, F1)")
    )
    table = make_table("side", "against", *titles, "difference", "p", title=title)
    for item in comparisons:
        values = item[kind]
        table.add_row(
            item["first"],
            item["second"],
            *(str(values[name]) for name in counts),
            _share(values["difference"], values["interval"]),
            f"{values['p']:.2g}",
        )
    return table


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    """Return a share in per cent with its interval, `?` if that is unbounded."""
    if value is None:
        return ""
    if interval is None:
        return f"{100 * value:.1f} (?)"
    return f"{100 * value:.1f} ({100 * interval[0]:.0f}..{100 * interval[1]:.0f})"
