"""`show`: print a saved answer, or write it as a page or a picture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.replace_file import find_target, is_same_file, write_private
from mlxroute.untrusted_text import TextFile
from mlxroute.user_folders import expand_user

_MAX_BYTES = 512 * 2**20


def show(
    settings: Settings,
    file: Annotated[Path, typer.Argument(help="Answer saved with `ask --save`.", metavar="FILE")],
    html: Annotated[
        Path | None,
        typer.Option(help="Write the answer as an HTML page instead.", metavar="OUT"),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Write the answer as a picture instead.", metavar="OUT")
    ] = None,
) -> int:
    """Print a saved answer, with both models' choices where the large one was asked."""
    from mlxroute.answers.document_file import load_document
    from mlxroute.cli.exit_codes import EXIT_OK
    from mlxroute.cli.terminal import make_consoles, print_note

    document = load_document(file)
    for path, parameter in ((html, "html"), (svg, "svg")):
        if path is not None and is_same_file(path, file):
            raise UsageError(
                f"{path} is the saved answer; choose another name", parameter=parameter
            )
    if html is not None and svg is not None and is_same_file(html, svg):
        raise UsageError(f"--html and --svg both name {html}; choose two names")
    out, err = make_consoles()
    files = []
    if html is not None:
        from mlxroute.view.answer_html import draw_page, is_page

        target = _find_target(html, is_page, "a page of an answer", "html")
        files.append((html, target, draw_page))
    if svg is not None:
        from mlxroute.view.answer_picture import draw_document
        from mlxroute.view.answer_svg import is_picture

        target = _find_target(svg, is_picture, "a picture of an answer", "svg")
        files.append((svg, target, draw_document))
    for path, target, draw in files:
        write_private(target, draw(document).encode())
        print_note(err, f"wrote {path}")
    if html is None and svg is None:
        from mlxroute.view.answer_text import answer_rows
        from mlxroute.view.word_wrap import print_rows, row_width

        print_rows(out, answer_rows(document, width=row_width(out)))
    return EXIT_OK


def _find_target(path: Path, is_own: Callable[[str], bool], kind: str, parameter: str) -> Path:
    """Return the file that a flag names.

    Raises UsageError if it cannot be written, or if it exists and is of another kind.
    """
    target = find_target(expand_user(path))
    if os.path.lexists(target):
        try:
            is_replaceable = is_own(TextFile(target, kind, max_bytes=_MAX_BYTES).read())
        except UsageError:
            is_replaceable = False
        if not is_replaceable:
            raise UsageError(
                f"{path} exists and is not {kind}; choose another name", parameter=parameter
            )
    return target
