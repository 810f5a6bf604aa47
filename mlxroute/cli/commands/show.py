"""`show`: print a saved answer, or write it as a page or a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.replace_file import write_private
from mlxroute.user_folders import expand_user


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
        if path is not None and _is_same_file(path, file):
            raise UsageError(
                f"{path} is the saved answer; choose another name", parameter=parameter
            )
    if html is not None and svg is not None and _is_same_file(html, svg):
        raise UsageError(f"--html and --svg both name {html}; choose two names")
    out, err = make_consoles()
    if html is not None:
        from mlxroute.view.answer_html import draw_page

        write_private(expand_user(html), draw_page(document).encode())
        print_note(err, f"wrote {html}")
    if svg is not None:
        from mlxroute.view.answer_picture import draw_document

        write_private(expand_user(svg), draw_document(document).encode())
        print_note(err, f"wrote {svg}")
    if html is None and svg is None:
        from mlxroute.view.answer_text import answer_rows
        from mlxroute.view.word_wrap import print_rows

        print_rows(out, answer_rows(document, width=out.width))
    return EXIT_OK


def _is_same_file(path: Path, other: Path) -> bool:
    path, other = expand_user(path), expand_user(other)
    try:
        return path.samefile(other)
    except OSError:
        # One of them does not exist yet.
        return os.path.realpath(path) == os.path.realpath(other)
