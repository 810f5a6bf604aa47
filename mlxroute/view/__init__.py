"""What the user sees of an answer: the live rendering, plain output and the lines about it."""

from mlxroute.view.live_view import AnswerStream, LiveView
from mlxroute.view.summary import Totals, closing_paragraph, summary_line
from mlxroute.view.terminal_text import PlainWriter, printable

__all__ = [
    "AnswerStream",
    "LiveView",
    "PlainWriter",
    "Totals",
    "closing_paragraph",
    "printable",
    "summary_line",
]
