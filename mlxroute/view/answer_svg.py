"""Pictures of answers as SVG: each token in the colour of the model that chose it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from xml.sax.saxutils import escape, quoteattr

from rich.style import Style

from mlxroute.safe_text import printable
from mlxroute.view.word_wrap import Row, StyledText, wrap_complete

_FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_FONT_PX = 14
_ROW_PX = 22
_CELL_PX = 8.7  # The widest of the fonts above.
_MARGIN_PX = 20

_PLAIN = Style()
_QUESTION = Style(bold=True)
_DIM = Style(dim=True)
_CONFIRMED = Style(underline=True)
_REPLACED = Style(color="magenta", underline=True, bold=True)
_START = re.compile(
    r'<svg xmlns="http://www\.w3\.org/2000/svg" width="(\d+)" height="(\d+)" viewBox="0 0 \1 \2"'
    r' role="img">\n<title>'
)
_NOT_IN_XML = dict.fromkeys((0xFFFE, 0xFFFF), "\ufffd")


@dataclass(frozen=True, slots=True)
class PicturedToken:
    """A token of a pictured answer.

    Args:
        text: What it adds to the answer.
        small_text: At an escalated position, the text of the small model's own choice; None, the
            default, elsewhere.
        large_text: At an escalated position, the text of the large model's choice, empty for the
            end of the answer; None, the default, if it is `text`.
        is_part: Whether it is a further part of the large token before it. False by default.
    """

    text: str
    small_text: str | None = None
    large_text: str | None = None
    is_part: bool = False

    @property
    def large_choice(self) -> str:
        """The text of the large model's choice at an escalated position."""
        return self.text if self.large_text is None else self.large_text

    @property
    def replaced(self) -> bool:
        """Whether the large model chose another token than the small one."""
        return self.small_text is not None and self.small_text != self.large_choice


@dataclass(frozen=True, slots=True)
class _Colours:
    page: str
    border: str
    text: str
    dim: str
    large: str


_LIGHT = _Colours(page="#ffffff", border="#d0d7de", text="#1f2328", dim="#59636e", large="#a5117f")
_DARK = _Colours(page="#0d1117", border="#3d444d", text="#e6edf3", dim="#9198a1", large="#ff7bd5")


def is_picture(text: str) -> bool:
    """Return whether a text is a picture that `draw_answer` returned."""
    return _START.match(text) is not None


def draw_answer(
    question: str,
    tokens: Sequence[PicturedToken],
    *,
    caption: str,
    dark: bool = False,
    width: int = 80,
) -> str:
    """Return a picture of an answer as SVG, on a background of its own.

    Below the answer it lists each position where the large model replaced the small one's token.
    The question is its title, and the text of the answer its description.

    Args:
        question: The question.
        tokens: The answer.
        caption: A line below the picture, such as the figures of the answer.
        dark: Whether to use the colours for a dark page. False by default.
        width: Length of a row, in cells. 80 by default.
    """
    colours = _DARK if dark else _LIGHT
    rows = list(_rows(question, tokens, caption, width))
    width_px = round(width * _CELL_PX + 2 * _MARGIN_PX)
    height_px = len(rows) * _ROW_PX + 2 * _MARGIN_PX
    baselines = count(_MARGIN_PX + _FONT_PX + 2, _ROW_PX)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="{height_px}"'
            f' viewBox="0 0 {width_px} {height_px}" role="img">',
            f"<title>{escape(_drawable(question))}</title>",
            f"<desc>{escape(_drawable(''.join(token.text for token in tokens)))}</desc>",
            f'<rect x="0.5" y="0.5" width="{width_px - 1}" height="{height_px - 1}" rx="8"'
            f' fill="{colours.page}" stroke="{colours.border}"/>',
            f'<g font-family="{_FONT}" font-size="{_FONT_PX}" fill="{colours.text}">',
            *(
                f'<text x="{_MARGIN_PX}" y="{y}" xml:space="preserve">{_spans(row, colours)}</text>'
                for row, y in zip(rows, baselines, strict=False)
            ),
            "</g>",
            "</svg>\n",
        ]
    )


def _rows(
    question: str, tokens: Sequence[PicturedToken], caption: str, width: int
) -> Iterator[Row]:
    answer = StyledText()
    for token in tokens:
        word = _drawable(token.text).lstrip(" ")
        answer = answer.append(" " * (len(_drawable(token.text)) - len(word)), _PLAIN)
        answer = answer.append(word, _style(token))
    yield from _wrap(f"> {question}", _QUESTION, width)
    yield []
    yield from wrap_complete(answer, width=width)
    yield []
    for index, token in enumerate(tokens):
        if token.replaced and token.small_text is not None:
            line = StyledText().append(f"token {index + 1}: the small model had ", _DIM)
            line = line.append(_name(token.small_text), _PLAIN)
            line = line.append(", the large one chose ", _DIM)
            yield from wrap_complete(line.append(_name(token.large_choice), _REPLACED), width=width)
    if any(_style(token) is _CONFIRMED for token in tokens):
        line = StyledText().append("underlined", _CONFIRMED)
        line = line.append(": asked as well, and both chose the same", _DIM)
        yield from wrap_complete(line, width=width)
    yield []
    yield from _wrap(caption, _DIM, width)


def _wrap(text: str, style: Style, width: int) -> list[Row]:
    return wrap_complete(StyledText().append(_drawable(text), style), width=width)


def _style(token: PicturedToken) -> Style:
    if token.replaced or token.is_part:
        return _REPLACED
    return _PLAIN if token.small_text is None else _CONFIRMED


def _name(text: str) -> str:
    """Return the text of a token on one line, or what it is if it shows nothing."""
    if not text:
        return "the end"
    line = _drawable(text).replace("\n", "\\n").replace("\t", "\\t").strip(" ")
    return line or "a space"


def _drawable(text: str) -> str:
    """Return the text without characters that control a terminal or that XML does not allow."""
    return printable(text).translate(_NOT_IN_XML)


def _spans(row: Row, colours: _Colours) -> str:
    return "".join(
        f"<tspan{_attributes(style or _PLAIN, colours)}>{escape(text)}</tspan>"
        for text, style, _ in row
    )


def _attributes(style: Style, colours: _Colours) -> str:
    """Return the attributes of a span; underlines show the source where colours do not."""
    attributes = {
        "fill": colours.large if style.color else colours.dim if style.dim else None,
        "font-weight": "bold" if style.bold else None,
        "text-decoration": "underline" if style.underline else None,
    }
    return "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items() if value)
