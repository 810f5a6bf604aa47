"""The documents: their command lines parse, their links lead somewhere, the README is short."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import typer

import mlxroute
from mlxroute.answers import document
from mlxroute.answers.document import AnswerSummary
from mlxroute.cli.app import command_group
from mlxroute.types import CallFailure, RunStats

_ROOT = Path(mlxroute.__file__).parent.parent
_README = _ROOT / "README.md"
_PAGES = [_README, *sorted((_ROOT / "docs").glob("*.md"))]
_LINKED_PAGES = [*_PAGES, _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "models").rglob("*.md"))]
_MAX_README_BYTES = 9216
_SHELL_OPERATORS = {"|", "||", "&&", ";", "&", ">", ">>", "<", "(", ")"}

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_TARGET = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _FENCED.findall(_text(page)) if language in languages]


def _inline_code(page: Path) -> list[str]:
    return _INLINE.findall(_FENCED.sub("", _text(page)))


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _our_commands(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of `mlxroute` in a line of shell."""
    if "mlxroute " not in f"{line} ":
        return
    command: list[str] = []
    for word in [*_words(line), ";"]:
        if word not in _SHELL_OPERATORS:
            command.append(word)
            continue
        while command and re.match(r"[A-Z_]+=", command[0]):
            del command[0]
        if command and Path(command[0]).name == "mlxroute":
            yield command[1:]
        command = []


@cache
def _command_at(path: str) -> Any:
    """Return the group or command that is called by some words; "" for the program itself."""
    command: Any = command_group()
    for word in path.split():
        command = command.commands[word]
    return command.load() if hasattr(command, "load") else command


def _command_paths() -> list[str]:
    """Return the paths of all commands and groups."""
    benchmarks = _command_at("bench").commands
    return [*_command_at("").commands, *(f"bench {name}" for name in benchmarks)]


def _options_of(command: Any) -> set[str]:
    parameters = command.get_params(typer.Context(command))
    return {name for parameter in parameters for name in parameter.opts}


def _parse(arguments: list[str]) -> None:
    """Parse a command line as the program does, without running it; raise its usage error."""
    command = _command_at("")
    names = ["mlxroute"]
    while arguments and arguments[0] in getattr(command, "commands", {}):
        names.append(arguments[0])
        command, arguments = _command_at(" ".join(names[1:])), arguments[1:]
    if hasattr(command, "commands"):
        # Options of a group act while they are parsed: --install-completion writes files.
        if not set(arguments) <= _options_of(command):
            raise AssertionError(f"{' '.join(names)} does not take {' '.join(arguments)}")
        return
    try:
        command.make_context(" ".join(names), list(arguments))
    except typer.Exit:
        assert "--help" in arguments


def _command_lines(page: Path) -> list[str]:
    blocks = [line for block in _blocks(page, "", "bash", "sh") for line in block.splitlines()]
    spans = [span for span in _inline_code(page) if span.startswith("mlxroute ")]
    return [line for line in [*blocks, *spans] if any(_our_commands(line))]


@cache
def _all_options() -> set[str]:
    """Return the options of all commands."""
    return {name for path in ("", *_command_paths()) for name in _options_of(_command_at(path))}


def _slug(heading: str) -> str:
    """Return the anchor that a heading gets."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")


def _broken_links(page: Path) -> list[str]:
    broken = []
    for groups in _TARGET.findall(_FENCED.sub("", _text(page))):
        target = "".join(groups)
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        anchors = [_slug(heading) for heading in _HEADING.findall(_text(file))] if anchor else []
        if not file.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    return broken


def test_the_readme_is_short() -> None:
    assert len(_README.read_bytes()) <= _MAX_README_BYTES


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page: Path) -> None:
    for line in _command_lines(page):
        for arguments in _our_commands(line):
            try:
                _parse(arguments)
            except Exception as exc:
                in_prose = f"`{line}`" in _text(page)
                # In prose a command may be named without its arguments.
                if not (in_prose and type(exc).__name__ == "MissingParameter"):
                    raise AssertionError(f"{line}: {exc}") from exc


@pytest.mark.parametrize(
    "page", [*_PAGES, _ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.name)
)
def test_command_lines_have_no_comments(page: Path) -> None:
    # An interactive zsh, the shell of a Mac, takes the words of a comment as arguments.
    lines = [line for block in _blocks(page, "", "bash", "sh") for line in block.splitlines()]
    assert not [line for line in lines if re.match(r"[\w./]+ .*\s# ", line)]


def test_the_readme_has_command_lines_to_parse() -> None:
    assert len(_command_lines(_README)) >= 8


@pytest.mark.parametrize(
    "line", ["mlxroute askk hi", "x | mlxroute ask --no-such -", "mlxroute x y"]
)
def test_a_wrong_command_line_does_not_parse(line: str) -> None:
    (arguments,) = _our_commands(line)
    with pytest.raises((AssertionError, typer.TyperException)):
        _parse(arguments)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_flag_in_prose_exists(page: Path) -> None:
    flags = {span.split()[0].split("|")[0] for span in _inline_code(page) if span[:2] == "--"}
    assert flags - _all_options() - {"--heavy"} == set()


@pytest.mark.parametrize("page", _LINKED_PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    assert _broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](page.md#a-b) [y](none.md) [z](#c) ![i](no.svg)", encoding="utf-8")
    assert _broken_links(page) == ["none.md", "#c", "no.svg"]


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_python_examples_are_valid(page: Path) -> None:
    for block in _blocks(page, "python"):
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom) and node.module == "mlxroute":
                assert {name.name for name in node.names} <= set(mlxroute.__all__)


def test_every_module_of_a_command_is_listed() -> None:
    modules = {file.stem for file in (_ROOT / "mlxroute" / "cli" / "commands").glob("[a-z]*.py")}
    paths = {path.replace(" ", "_") for path in _command_paths()}
    assert modules == paths - {"bench"}


def test_lists_of_commands_show_the_first_line_of_the_help_of_each() -> None:
    for path in _command_paths():
        command = _command_at(path)
        assert command.short_help == command.help.partition("\n")[0], path


def test_only_show_has_no_settings_as_their_page_says() -> None:
    without = [
        path for path in _command_paths() if "--cache-dir" not in _options_of(_command_at(path))
    ]
    assert without == ["show", "bench"]
    assert "| `--cache-dir`: every command except `show` |" in _text(_ROOT / "docs" / "settings.md")


def test_every_headline_figure_links_to_its_report() -> None:
    section = _text(_README).split("## Measured")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6
    assert [row for row in rows if "bench/results/" not in row] == []


def test_the_json_page_names_exactly_the_keys_that_are_printed() -> None:
    documented = set(re.findall(r'"(\w+)":', "".join(_blocks(_ROOT / "docs" / "json.md", ""))))
    source = ast.parse(_text(_ROOT / "mlxroute" / "cli" / "json_lines.py"))
    printed = {
        key.value
        for node in ast.walk(source)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    assert documented == printed | set(AnswerSummary.__slots__) | set(CallFailure.__slots__)


def test_the_page_of_saved_answers_names_exactly_the_keys_of_the_format() -> None:
    blocks = "".join(_blocks(_ROOT / "docs" / "answers.md", ""))
    documented = set(re.findall(r'"(\w+)":', blocks)) - {"role", "content"}
    records = [item for item in vars(document).values() if dataclasses.is_dataclass(item)]
    keys = {
        field.name
        for record in records
        if record not in (AnswerSummary, CallFailure, RunStats)
        for field in dataclasses.fields(record)
    }
    # A choice names its bytes only where its text is not them.
    assert documented == keys - {"bytes"}


def test_the_page_of_saved_answers_names_every_decision() -> None:
    page = _text(_ROOT / "docs" / "answers.md")
    _, *named = re.findall(r"^\| `([a-z ]+)` \|", page, re.MULTILINE)
    assert named == [decision.value for decision in document.TokenDecision]


def test_sides_with_an_adapter_are_compared_with_those_without(tmp_path: Path) -> None:
    def side(right: str, router: str | None = None) -> dict[str, Any]:
        accuracy = right.count("1") / len(right)
        marks = {"accuracy": accuracy, "interval": [0, 1], "right": right}
        return {
            "router": router,
            "lenient": marks,
            "strict": {"no_answer": 1},
            "large_tokens_per_question": 1.5,
            "escalation_rate": 0.05,
        }

    plain = {"small": side("1000000000"), "large": side("1111111000")}
    routed = {"entropy 5%": side("1100000000", "entropy")}
    tuned = {
        "small": side("0111111100"),
        "large": plain["large"],
        "head 5%": side("1" * 10, "head"),
    }
    against_small = {"first": "head 5%", "lenient": {"difference": 0.3, "p": 0.25}}
    comparisons = [{**against_small, "second": s} for s in ("small, without the adapter", "small")]
    for name, sides in {"a": {**plain, **routed}, "b": tuned}.items():
        own = comparisons if name == "b" else []
        report = {"questions": 10, "sides": sides, "comparisons": own}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    script = runpy.run_path(str(_ROOT / "bench" / "quality_tables.py"))
    text = script["write_tables"]("<!-- table: a.json b.json -->\n<!-- end -->", tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[3:-1]]
    assert [(row[0], row[3].split()[0], row[4], row[6]) for row in rows] == [
        ("small", "10.0", "", ""),
        ("large", "70.0", "", ""),
        ("entropy 5%", "20.0", "17", ""),
        ("adapted, small", "70.0", "100", "`small`: +60.0, p = 0.07"),
        ("adapted, head 5%", "100.0", "150", "`adapted, small`: +30.0, p = 0.25"),
    ]


def test_a_table_of_sets_has_a_row_for_each_routed_side(tmp_path: Path) -> None:
    def side(router: str | None, share: float, f1: float | None = None) -> dict[str, Any]:
        marks = {"accuracy": share, "interval": [0, 1], "p_against_small": 0.00001}
        agreement = {"f1": f1, "interval": [0, 1]}
        figures = {"large_tokens_per_question": 2.5, "escalation_rate": 0.05, "router": router}
        return figures | {"lenient": marks if f1 is None else None, "with_large": agreement}

    answered = {"small": side(None, 0.2), "large": side(None, 0.6), "head 5%": side("head", 0.3)}
    opened = {
        "small": side(None, 0, 0.5),
        "large": side(None, 0, 1),
        "entropy 5%": side("entropy", 0, 0.6),
        "head 5%": side("head", 0, 0.75),
    }
    against = [
        {"first": name, "second": "small", "with_large": {"p": 0.031}}
        for name in ("entropy 5%", "head 5%")
    ]
    for name, sides in {"a": answered, "b": opened}.items():
        report = {"data": name, "questions": 10, "sides": sides, "comparisons": against}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    script = runpy.run_path(str(_ROOT / "bench" / "quality_tables.py"))
    text = script["write_tables"]("<!-- sets: a.json b.json -->\n<!-- end -->", tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[3:-1]]
    assert [(*row[:5], row[8], row[9]) for row in rows] == [
        ("a", "10", "20.0", "60.0", "head 5%", "25", "+10.0, p < 0.0001"),
        ("b", "10", "50.0", "100.0", "entropy 5%", "20", "+10.0, p = 0.031"),
        ("", "", "", "", "head 5%", "50", "+25.0, p = 0.031"),
    ]


def test_the_picture_of_sets_shows_each_set_and_the_routers_of_their_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def side(router: str | None, share: float) -> dict[str, Any]:
        return {
            "router": router,
            "lenient": {"accuracy": share, "interval": [share / 2, (1 + share) / 2]},
        }

    report = {
        "sides": {
            "small": side(None, 0.2),
            "large": side(None, 0.6),
            "head 5%": side("head", 0.3),
            "first 5%": side("first", 0.2),
        }
    }
    monkeypatch.syspath_prepend(str(_ROOT / "bench"))
    script = runpy.run_path(str(_ROOT / "bench" / "plots.py"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        script["draw_sets"]({"First set": report, "Second set": report}, tmp_path / "sets.svg")
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", _text(tmp_path / "sets.svg")))
    assert {"First set", "Second set", "small alone", "large alone", "head"} <= texts
    assert not texts & {"first", "entropy"}


def test_the_accuracy_tables_are_those_of_the_reports() -> None:
    script = runpy.run_path(str(_ROOT / "bench" / "quality_tables.py"))
    text = _text(_ROOT / "docs" / "benchmarks.md")
    assert "<!-- table: " in text
    assert script["write_tables"](text) == text
