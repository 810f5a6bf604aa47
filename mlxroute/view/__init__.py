"""Display of answers: live on a terminal, plain in a pipe, and their figures in words."""

from mlxroute.view.demo_outcome import (
    DemoAnswer,
    closing_paragraph,
    describe_choice,
    describe_outcome,
    result_line,
)
from mlxroute.view.live_area import AnswerStream, DocumentedStream
from mlxroute.view.live_view import LiveView
from mlxroute.view.plain_writer import PlainWriter
from mlxroute.view.summary import ChatTotals, summary_line

__all__ = [
    "AnswerStream",
    "ChatTotals",
    "DemoAnswer",
    "DocumentedStream",
    "LiveView",
    "PlainWriter",
    "closing_paragraph",
    "describe_choice",
    "describe_outcome",
    "result_line",
    "summary_line",
]
