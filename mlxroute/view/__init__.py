"""What the user sees of an answer: the live rendering, plain output and the lines about it."""

from mlxroute.view.live_view import AnswerStream, LiveView
from mlxroute.view.plain_writer import PlainWriter
from mlxroute.view.summary import ChatTotals, closing_paragraph, summary_line

__all__ = [
    "AnswerStream",
    "ChatTotals",
    "LiveView",
    "PlainWriter",
    "closing_paragraph",
    "summary_line",
]
