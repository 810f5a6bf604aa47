"""Completion in the shell: model names, choices, and the script that a shell loads."""

from __future__ import annotations

import pytest

from mlxroute.catalog import Catalog
from mlxroute.types import Mode
from tests.support.command_process import run_command


def complete(line: str) -> list[str]:
    """Return what bash is offered for the last word of a line."""
    variables = {
        "_MLXROUTE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    result = run_command(environ=variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode().split()


@pytest.mark.parametrize("line", ["ask --small ", "host ", "pull ", "bench speed --small "])
def test_model_names_are_completed(line: str) -> None:
    names = [model.name for model in Catalog.load().models]
    assert complete(f"mlxroute {line}") == names
    assert complete(f"mlxroute {line}smol") == [n for n in names if n.startswith("smol")]


def test_commands_and_choices_are_completed() -> None:
    assert complete("mlxroute pr") == ["probe"]
    assert complete("mlxroute chat --mode ") == list(Mode)
    assert "max-probability" in complete("mlxroute ask --router ma")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_names_the_program(shell: str) -> None:
    # Without it, the shell that runs the tests would count, not the one that is named.
    environ = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    # A new interpreter is started as `python -m mlxroute`.
    result = run_command("--show-completion", shell, environ=environ, fresh=shell == "bash")
    assert result.returncode == 0, result.stderr
    assert b"_MLXROUTE_COMPLETE" in result.stdout
    assert b"python -m" not in result.stdout
