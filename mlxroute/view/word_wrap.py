"""Word wrap, by terminal cells, for text that is still growing.

A row depends only on the text from its start, and a full row is not changed by later text. A
growing text therefore wraps to the same rows as the complete one, and full rows can be printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from wcwidth import iter_graphemes

TAB_CELLS = 4
_NOT_AT_ROW_START = frozenset("、。，．：；！？）」』】〉》〕］｝’”ー々…,.:;!?)]}%\"'")
_NOT_AT_ROW_END = frozenset("（「『【〈《〔［｛‘“([{\"'")

Row = list[Segment]
"""One row of output, without a newline and with tabs expanded."""


@dataclass(frozen=True, slots=True)
class StyledText:
    """Text with a style for each code point."""

    text: str = ""
    styles: tuple[Style, ...] = ()

    def append(self, text: str, style: Style) -> StyledText:
        """Return a copy with more text at the end."""
        return StyledText(self.text + text, self.styles + (style,) * len(text))

    def after(self, index: int) -> StyledText:
        """Return the text from an index on."""
        return StyledText(self.text[index:], self.styles[index:])


@lru_cache(maxsize=4096)
def _cells(cluster: str) -> int:
    # Terminals differ on joined emoji. The widest reading never shrinks as a cluster grows.
    return max(cell_len(cluster), sum(cell_len(char) for char in cluster))


def _tab_stop(column: int) -> int:
    return column + TAB_CELLS - column % TAB_CELLS


def _can_break_between(before: str, after: str) -> bool:
    """Return whether a row may end between two clusters without a space: if either is wide."""
    if before[0] in _NOT_AT_ROW_END or after[0] in _NOT_AT_ROW_START:
        return False
    return cell_len(before[0]) == 2 or cell_len(after[0]) == 2


def _row_end(text: str, width: int) -> tuple[int, int] | None:
    """Return where the first row's visible text ends and where the next row starts.

    None means that the row is not full.
    """
    column = visible_end = index = 0
    previous = " "
    last_break: tuple[int, int] | None = None
    for cluster in iter_graphemes(text):
        if cluster == "\n":
            return visible_end, index + 1
        if cluster == "\t":
            column = _tab_stop(column)
        elif cluster == " ":
            column += 1
        else:
            if visible_end and (previous in " \t" or _can_break_between(previous, cluster)):
                last_break = visible_end, index
            if column + _cells(cluster) > width:
                if last_break or index:
                    return last_break or (visible_end, index)
                return _split_wide_cluster(cluster, width)
            column += _cells(cluster)
            visible_end = index + len(cluster)
        previous = cluster
        index += len(cluster)
    return None


def _split_wide_cluster(cluster: str, width: int) -> tuple[int, int]:
    """Return the row end inside a cluster that is wider than a row."""
    fitting = [end for end in range(1, len(cluster)) if _cells(cluster[:end]) <= width]
    end = fitting[-1] if fitting else 1
    return end, end


def _styled_clusters(styled: StyledText) -> Iterator[tuple[str, Style]]:
    """Yield each cluster, tabs as spaces, with the style of its first code point."""
    column = index = 0
    for cluster in iter_graphemes(styled.text):
        text = " " * (_tab_stop(column) - column) if cluster == "\t" else cluster
        column += len(text) if cluster in " \t" else _cells(cluster)
        yield text, styled.styles[index]
        index += len(cluster)


def _build_row(styled: StyledText, end: int) -> Row:
    clusters = _styled_clusters(StyledText(styled.text[:end], styled.styles[:end]))
    return [
        Segment("".join(text for text, _ in run), style)
        for style, run in groupby(clusters, key=lambda cluster: cluster[1])
    ]


def wrap_growing(styled: StyledText, *, width: int) -> tuple[list[Row], StyledText]:
    """Return the rows that later text cannot change, and the rest, which is less than one row.

    A row has at most `width` cells. Rows break at spaces, which are dropped there, and beside wide
    characters; longer words are split. Indentation is kept.
    """
    rows = []
    while end := _row_end(styled.text, width):
        rows.append(_build_row(styled, end[0]))
        styled = styled.after(end[1])
    return rows, styled


def wrap_complete(styled: StyledText, *, width: int) -> list[Row]:
    """Return all rows of a complete text; blanks after the last newline make no row."""
    rows, rest = wrap_growing(styled, width=width)
    visible = rest.text.rstrip(" \t")
    return [*rows, _build_row(rest, len(visible))] if visible else rows


def row_width(console: Console) -> int | None:
    """Return the cells of a row; None in a file or pipe, where lines stay whole."""
    return console.width if console.is_terminal else None


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print rows as they are."""
    if rows:
        segments = [segment for row in rows for segment in (*row, Segment.line())]
        console.print(Segments(segments), end="", crop=False)
