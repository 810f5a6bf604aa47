"""Word wrap by terminal cells for text that is still growing.

A row depends only on the text from its own start, and once it is full no later text changes it.
So a growing text wraps to the same rows as the finished one, and full rows can be let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from wcwidth import iter_graphemes

TAB_CELLS = 4
_NEVER_FIRST = frozenset("、。，．：；！？）」』】〉》〕］｝’”ー々…,.:;!?)]}%\"'")
_NEVER_LAST = frozenset("（「『【〈《〔［｛‘“([{\"'")

Row = list[Segment]
"""One line of output without its newline, tabs expanded."""


@dataclass(frozen=True, slots=True)
class Styled:
    """Text with a style for each of its code points."""

    text: str = ""
    styles: tuple[Style, ...] = ()

    def then(self, text: str, style: Style) -> Styled:
        """This text with more of it at the end."""
        return Styled(self.text + text, self.styles + (style,) * len(text))

    def after(self, index: int) -> Styled:
        """The text from an index on."""
        return Styled(self.text[index:], self.styles[index:])


@lru_cache(maxsize=4096)
def _cells(cluster: str) -> int:
    # Terminals differ on joined emoji: count the widest reading, which never shrinks as a
    # cluster grows.
    return max(cell_len(cluster), sum(cell_len(char) for char in cluster))


def _tab_stop(column: int) -> int:
    return column + TAB_CELLS - column % TAB_CELLS


def _may_part(before: str, after: str) -> bool:
    """Whether a row may end between two clusters with no space there: beside wide characters."""
    if before[0] in _NEVER_LAST or after[0] in _NEVER_FIRST:
        return False
    return cell_len(before[0]) == 2 or cell_len(after[0]) == 2


def _row_end(text: str, width: int) -> tuple[int, int] | None:
    """Where the first row's ink ends and the next row starts; None while the row may still grow."""
    column = ink_end = at = 0
    previous = " "
    part: tuple[int, int] | None = None
    for cluster in iter_graphemes(text):
        if cluster == "\n":
            return ink_end, at + 1
        if cluster == "\t":
            column = _tab_stop(column)
        elif cluster == " ":
            column += 1
        else:
            if ink_end and (previous in " \t" or _may_part(previous, cluster)):
                part = ink_end, at
            if column + _cells(cluster) > width:
                if part or at:
                    return part or (ink_end, at)
                return _too_wide(cluster, width)
            column += _cells(cluster)
            ink_end = at + len(cluster)
        previous = cluster
        at += len(cluster)
    return None


def _too_wide(cluster: str, width: int) -> tuple[int, int]:
    fits = [end for end in range(1, len(cluster)) if _cells(cluster[:end]) <= width]
    end = fits[-1] if fits else 1
    return end, end


def _pieces(styled: Styled) -> Iterator[tuple[str, Style]]:
    column = at = 0
    for cluster in iter_graphemes(styled.text):
        shown = " " * (_tab_stop(column) - column) if cluster == "\t" else cluster
        column += len(shown) if cluster in " \t" else _cells(cluster)
        yield shown, styled.styles[at]
        at += len(cluster)


def _row(styled: Styled, end: int) -> Row:
    pieces = _pieces(Styled(styled.text[:end], styled.styles[:end]))
    return [
        Segment("".join(shown for shown, _ in run), style)
        for style, run in groupby(pieces, key=lambda piece: piece[1])
    ]


def full_rows(styled: Styled, *, width: int) -> tuple[list[Row], Styled]:
    """The rows no later text can change, and the rest, which is less than one row.

    Breaks at spaces and beside wide characters, folds longer words, drops the spaces at a break,
    keeps indentation. A row holds at most `width` cells.
    """
    rows = []
    while end := _row_end(styled.text, width):
        rows.append(_row(styled, end[0]))
        styled = styled.after(end[1])
    return rows, styled


def all_rows(styled: Styled, *, width: int) -> list[Row]:
    """Every row of a text that is complete; blank text after the last newline is no row."""
    rows, rest = full_rows(styled, width=width)
    ink = rest.text.rstrip(" \t")
    return [*rows, _row(rest, len(ink))] if ink else rows
