"""Tables of the demo: its three answers side by side, and the tokens asked of the large model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlxroute.cli.terminal import make_fitting_table
from mlxroute.safe_text import printable
from mlxroute.types import Token, Vocabulary
from mlxroute.view import DemoAnswer, result_line
from mlxroute.view.answer_text import shorten_context
from mlxroute.view.figures import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_VERDICT_STYLES: Final = {"right": "bold green", "wrong": "bold red"}
_MAX_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class EscalatedToken:
    """A position of the routed answer that was escalated.

    Args:
        number: Its number in the answer, from 1.
        before: The end of the text before it.
        small: The small model's token.
        large: The large model's token; None if there was no answer.
        agreed: Whether both chose the same token.
    """

    number: int
    before: str
    small: str
    large: str | None
    agreed: bool


def list_escalations(tokens: Sequence[Token], vocabulary: Vocabulary) -> list[EscalatedToken]:
    """Return the escalated positions of an answer, in order."""

    def show(token_ids: Sequence[int]) -> str:
        if token_ids[0] in vocabulary.eos_ids:
            return "(end)"
        data = b"".join(map(vocabulary.token_bytes, token_ids))
        return '"' + printable(data.decode(errors="replace")).replace("\n", "\\n") + '"'

    rows, text = [], ""
    for token in tokens:
        if (escalation := token.escalation) is not None:
            large = escalation.large
            row = EscalatedToken(
                number=token.index + 1,
                before=shorten_context(text),
                small=show((escalation.small_id,)),
                large=None if large is None else show(large.token_ids),
                agreed=escalation.agreed,
            )
            rows.append(row)
        text += token.text
    return rows


def table_of_escalations(rows: Sequence[EscalatedToken], console: Console) -> Table:
    """Return a table, for a console, of what each model chose where the large one was asked."""
    lines = []
    for row in rows[:_MAX_ROWS]:
        large = "no answer" if row.large is None else "the same" if row.agreed else row.large
        lines.append((str(row.number), row.before, row.small, large))
    table = _table(("token", "after", "small model", "large model"), lines, console, optional=1)
    if len(rows) > _MAX_ROWS:
        table.caption = f"and {len(rows) - _MAX_ROWS} more"
    return table


def result_text(answer: DemoAnswer) -> Text:
    """Return the line about a finished answer, with its verdict in colour."""
    from rich.text import Text

    text = Text(result_line(answer))
    text.stylize("dim", len(answer.verdict))
    text.stylize(_VERDICT_STYLES.get(answer.verdict, ""), 0, len(answer.verdict))
    return text


def table_of_answers(answers: Sequence[DemoAnswer], console: Console) -> Table:
    """Return a table, for a console, of the verdict, time, tokens and uploads of the answers."""
    lines = [
        (
            name,
            answer.verdict,
            format_seconds(answer.stats.total_s),
            f"{answer.stats.tokens:,}",
            f"{answer.stats.large_tokens:,}",
            format_size(answer.stats.uploaded_bytes) if answer.stats.requests else "-",
        )
        for name, answer in zip(("small", "routed", "large"), answers, strict=True)
    ]
    columns = ("", "answer", "time", "tokens", "by large", "uploaded")
    return _table(columns, lines, console, optional=5)


def _table(
    columns: Sequence[str], lines: Sequence[Sequence[str]], console: Console, *, optional: int
) -> Table:
    """Return a table, without the column of number `optional` where the terminal is narrow."""
    from rich.text import Text

    rows = [[Text(cell, _VERDICT_STYLES.get(cell, "")) for cell in line] for line in lines]
    essential = [i for i in range(len(columns)) if i != optional]
    return make_fitting_table(columns, rows, console=console, essential=essential)
