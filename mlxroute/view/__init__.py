"""Display of answers: live on a terminal, plain in a pipe, and their figures in words."""

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
