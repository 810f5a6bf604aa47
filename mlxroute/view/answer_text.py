"""A saved answer as rows of text: its tokens by model, and what both models chose where asked."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from rich.segment import Segment
from rich.style import Style
from wcwidth import iter_graphemes

from mlxroute.answers.document import (
    AnswerDocument,
    DocumentToken,
    LargeChoice,
    SmallChoice,
    TokenDecision,
)
from mlxroute.safe_text import printable, printable_line
from mlxroute.types import Source
from mlxroute.view.figures import format_count, format_percent
from mlxroute.view.live_view import LARGE_STYLE
from mlxroute.view.summary import summary_line
from mlxroute.view.word_wrap import Row, StyledText, wrap_complete

_PLAIN = Style()
_DIM = Style(dim=True)
_BOLD = Style(bold=True)
_CHECKED = Style(underline=True)
_UNCHECKED = Style(color="yellow", underline=True)
_STYLES = {
    TokenDecision.ACCEPTED: _CHECKED,
    TokenDecision.UNCHECKED: _UNCHECKED,
}
_CONTEXT_CHARACTERS = 32
_NAME_CHARACTERS = 40
_INDENT = "  "
_NO_BREAK_SPACE = "\u00a0"

_Part = tuple[str, Style]


def answer_rows(document: AnswerDocument, *, width: int | None) -> list[Row]:
    """Return a saved answer: models, question, text, escalated positions and figures.

    With a `width` of None, lines stay whole.
    """
    # A text completion has no messages at all.
    earlier = max(0, len(document.messages) - 1)
    rows = _wrap([(_describe_origin(document), _DIM)], width)
    if earlier:
        rows += _wrap([(f"after {format_count(earlier, 'earlier message')}", _DIM)], width)
    rows += [[], *_wrap([(f"> {document.question}", _BOLD)], width), []]
    rows += _wrap(((token.text, _style(token)) for token in document.tokens), width)
    rows += [[], *escalation_rows(document, width=width), []]
    return rows + _wrap([(summary_line(document.summary.stats()), _DIM)], width)


def escalation_rows(document: AnswerDocument, *, width: int | None) -> list[Row]:
    """Return what each model chose at every position where the large one was to be asked.

    With a `width` of None, lines stay whole.
    """
    rows, text = [], ""
    for token in document.tokens:
        if token.large is not None or not token.checked:
            rows += _escalation(token, text, width)
        text = (text + token.text)[-4 * _CONTEXT_CHARACTERS :]
    if not rows:
        rows += _wrap([("the large model was asked nowhere in this answer", _DIM)], width)
    over = sum(token.decision is TokenDecision.OVER_BUDGET for token in document.tokens)
    if over:
        line = f"{format_count(over, 'more position')} scored above the threshold, over the budget"
        rows += _wrap([(line, _DIM)], width)
    return rows


def describe_decision(token: DocumentToken) -> str:
    """Return in words how a position was decided."""
    scores = f"score {token.score:.3g}, threshold {token.threshold:.3g}"
    match token.decision:
        case TokenDecision.REPLACED:
            text = "the large model's token replaced the small one's"
        case TokenDecision.AGREED:
            text = "both chose the same"
        case TokenDecision.ACCEPTED:
            text = "the small model's token was kept: nearly as likely to the large one"
        case TokenDecision.UNCHECKED:
            text = f"unchecked: {printable_line(token.unchecked_reason or 'no reply')}"
        case TokenDecision.OVER_BUDGET:
            text = "the small model's token was kept: the budget was used up"
        case TokenDecision.CONTINUED:
            text = "a further part of the large model's token"
        case TokenDecision.KEPT:
            text = "the small model's token was kept"
    prefetched = ", prefetched by an earlier call" if token.prefetched else ""
    return f"{text} ({scores}{prefetched})"


def shorten_context(text: str) -> str:
    """Return the last whole words of a text as one line, after "…" if there are words before.

    Text without spaces is cut between characters, as a reader sees them.
    """
    line = printable_line(text, limit=len(text) + 1)
    if len(line) <= _CONTEXT_CHARACTERS:
        return line
    words = line[-_CONTEXT_CHARACTERS:].partition(" ")[2]
    return "…" + (words or _last_characters(line))


def _last_characters(line: str) -> str:
    """Return the end of a line, without the rest of a joined character that does not fit."""
    end, size = "", 0
    for cluster in reversed(list(iter_graphemes(line[-4 * _CONTEXT_CHARACTERS :]))):
        size += len(cluster)
        if size > _CONTEXT_CHARACTERS:
            break
        end = cluster + end
    return end or line[-_CONTEXT_CHARACTERS:]


def _describe_origin(document: AnswerDocument) -> str:
    models, router = document.models, document.router
    if models.large is None:
        return f"{models.small} alone, {document.created}"
    rule = f"at threshold {router.threshold}"
    if router.budget is not None:
        rule = f"for at most {100 * router.budget:g}% of the tokens"
    return (
        f"{models.small}, asking {models.large} {rule}, by {router.name}"
        f" (mode {document.options.mode}), {document.created}"
    )


def _escalation(token: DocumentToken, before: str, width: int | None) -> list[Row]:
    line = shorten_context(before)
    head: list[_Part] = [(f"token {token.index + 1}", _BOLD)]
    if line:
        head.append((f", after {line}", _DIM))
    rows = _wrap(head, width)
    # A row must not break inside a name.
    space = " " if width is None else _NO_BREAK_SPACE
    if token.small is not None:
        style = _BOLD if token.source is Source.SMALL else _PLAIN
        rows += _indented(_choices("small  ", token.small, style, space), width)
    if token.large is not None:
        style = LARGE_STYLE if token.source is Source.LARGE else _PLAIN
        rows += _indented(_choices("large  ", token.large, style, space), width)
    return rows + _indented([(describe_decision(token), _DIM)], width)


def _choices(label: str, model: SmallChoice | LargeChoice, style: Style, space: str) -> list[_Part]:
    """Return a model's choice and the other tokens that it considered, with this kind of space."""
    parts = [(label, _DIM), (_name(model.text, space), style)]
    parts.append((_share(model.logprob, space), _DIM))
    for choice in model.top:
        if choice.text != model.text:
            share = _share(choice.logprob, space)
            parts.append((f", {_name(choice.text, space)}{share}", _DIM))
    return parts


def _name(text: str, space: str) -> str:
    """Return the text of a token in quotes, on one line."""
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t").replace(" ", space)
    return f'"{line[:_NAME_CHARACTERS]}"' if line else "(nothing)"


def _share(logprob: float | None, space: str) -> str:
    if logprob is None or math.isnan(logprob):
        return ""
    return f"{space}{format_percent(min(1.0, math.exp(min(0.0, logprob))))}"


def _style(token: DocumentToken) -> Style:
    return LARGE_STYLE if token.source is Source.LARGE else _STYLES.get(token.decision, _PLAIN)


def _indented(parts: Iterable[_Part], width: int | None) -> list[Row]:
    rows = _wrap(parts, None if width is None else max(1, width - len(_INDENT)))
    return [[Segment(_INDENT), *row] for row in rows]


def _wrap(parts: Iterable[_Part], width: int | None) -> list[Row]:
    pieces = [(printable(text), style) for text, style in parts]
    styles = tuple(style for text, style in pieces for _ in text)
    text = StyledText("".join(text for text, _ in pieces), styles)
    return wrap_complete(text, width=sys.maxsize if width is None else width)
