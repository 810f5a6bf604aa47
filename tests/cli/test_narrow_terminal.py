"""Help, lists and reports on a terminal of 40 columns."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from mlxroute.catalog import Catalog
from mlxroute.cli import main
from mlxroute.cli.terminal import make_table, print_table
from mlxroute.config import user_catalog_dir
from tests.support.pseudo_terminal import PseudoTerminal

COLUMNS = 40


def output_of(*arguments: str, columns: int = COLUMNS) -> str:
    environ = {"MLXROUTE_OFFLINE": "1"}
    with PseudoTerminal(arguments, columns=columns, environ=environ) as terminal:
        terminal.wait()
        terminal.drain()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.output).replace("\r", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ask", "--help"], ["bench", "quality", "--help"], ["models"]]
)
def test_no_line_is_longer_than_the_terminal(arguments: list[str]) -> None:
    output = output_of(*arguments)
    assert output
    assert [line for line in output.splitlines() if len(line) > COLUMNS] == []
    assert "..." not in output.replace("]...", "")


def test_no_name_of_a_model_is_broken_on_a_narrow_terminal() -> None:
    words = set(output_of("models").split())
    assert {model.name for model in Catalog.load(user_catalog_dir()).models} <= words


def test_a_row_of_a_table_is_one_line_in_a_file_or_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert main(["models"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    catalog = Catalog.load(user_catalog_dir())
    for model in catalog.models:
        assert any(row[:1] == [model.name] and row[-1] in model.license for row in rows)
    for pair in catalog.pairs:
        assert any(row[:2] == [pair.small, pair.large] for row in rows)


def test_no_cell_is_cut_off_in_a_file_or_pipe() -> None:
    out = io.StringIO()
    table = make_table("path", "kind", wrap=False)
    table.add_row("folder " * 50, "x" * 200)
    print_table(Console(file=out, width=20), table)
    _, row = out.getvalue().splitlines()
    assert row.split() == ["folder"] * 50 + ["x" * 200]


def test_help_breaks_no_word_on_a_narrow_terminal() -> None:
    def words(text: str) -> list[str]:
        return sorted(re.findall(r"[A-Za-z]+", text))

    assert words(output_of("ask", "--help")) == words(output_of("ask", "--help", columns=120))


def test_a_report_is_wrapped_below_its_labels_on_a_narrow_terminal() -> None:
    lines = [line.rstrip() for line in output_of("doctor").splitlines()]
    assert max(map(len, lines)) <= COLUMNS
    at = lines.index("ok   memory")
    assert re.fullmatch(r"     [0-9.]+ GiB free", lines[at + 1])
    assert os.environ["MLXROUTE_CACHE_DIR"] in "".join(line.strip() for line in lines)
    assert Path(os.environ["MLXROUTE_CACHE_DIR"]).exists()
