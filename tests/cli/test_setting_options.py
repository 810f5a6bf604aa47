"""Options come from the declared settings; errors name the flag that helps."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.app import main
from mlxroute.cli.commands.doctor import _check_large
from mlxroute.cli.error_advice import error_message
from mlxroute.cli.routing import RoutingRule
from mlxroute.cli.setting_options import with_setting_options
from mlxroute.config import load_settings
from mlxroute.config import settings as settings_module
from mlxroute.config.declarations import setting
from mlxroute.config.settings import Settings, declared_settings
from mlxroute.errors import ContextTooLong, UsageError
from mlxroute.routers import make_router


@dataclasses.dataclass(frozen=True, slots=True)
class SettingsWithFoo(Settings):
    """The settings and one more, declared by its field alone."""

    foo: int | None = setting(None, "A fictitious setting.", metavar="N", commands=("ask",))


@pytest.fixture
def with_foo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "Settings", SettingsWithFoo)
    monkeypatch.setattr("mlxroute.config.sources.Settings", SettingsWithFoo)
    declared_settings.cache_clear()


@pytest.fixture(autouse=True)
def _declared_again() -> object:
    yield
    declared_settings.cache_clear()


def run(command: str, *arguments: str) -> tuple[int, str, list[Settings]]:
    """Run a command that takes the settings and one option of its own."""
    received = []

    def show(
        settings: Settings, own: Annotated[str, typer.Option(help="Its own option.")] = "x"
    ) -> int:
        received.append(settings)
        return 3

    app = typer.Typer(rich_markup_mode=None)
    app.command()(with_setting_options(show, command))
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output, received


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        (r"\n", "\n"),
        (r"\n\n\t", "\n\n\t"),
        (r"\\n", r"\n"),
        (r"\\", "\\"),
        (r"\d\x0a", r"\d\x0a"),
        ("\n", "\n"),
        ("END", "END"),
    ],
)
def test_a_stop_text_may_contain_escapes(
    text: str, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, received = run("ask", "--stop", text)
    monkeypatch.setenv("MLXROUTE_STOP", text)
    received += run("ask")[2]
    assert [settings.stop for settings in received] == [(stop,), (stop,)]


@pytest.mark.usefixtures("with_foo")
def test_one_field_makes_a_flag_a_variable_and_a_config_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, received = run("ask", "--foo", "5", "--own", "y", "--stop", "a", "--stop", "b")
    assert code == 3
    assert received[0].foo == 5  # type: ignore[attr-defined]
    assert received[0].stop == ("a", "b")
    monkeypatch.setenv("MLXROUTE_FOO", "6")
    _, _, received = run("ask")
    assert received[0].foo == 6  # type: ignore[attr-defined]
    assert "A fictitious setting." in run("ask", "--help")[1]
    assert run("probe", "--foo", "5")[0] == 2


def test_a_command_takes_the_settings_that_name_it_and_no_others() -> None:
    help_text = run("models", "--help")[1]
    assert "--cache-dir DIR" in help_text
    assert "--own" in help_text
    assert "--small" not in help_text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            UsageError("max_tokens must be at least 1, not 0", parameter="max_tokens"),
            "--max-tokens must be at least 1, not 0",
        ),
        (
            UsageError("timeout_s must be above 0, not 0", parameter="timeout_s"),
            "--timeout must be above 0, not 0",
        ),
        (
            UsageError("unknown mode 'fast'; choose one of auto, wait", parameter="mode"),
            "unknown mode 'fast'; choose one of auto, wait (--mode)",
        ),
        (
            UsageError("the training diverged", parameter="learning_rate"),
            "the training diverged (--learning-rate)",
        ),
        (UsageError("the prompt is empty"), "the prompt is empty"),
        (UsageError("rows must be even", parameter="rows"), "rows must be even"),
        (
            ContextTooLong("too long; shorten it"),
            "too long; shorten it, or choose a small model with a longer context (--small)",
        ),
    ],
)
def test_an_error_names_the_flag_or_command_that_helps(error: UsageError, message: str) -> None:
    assert error_message(error) == message


@pytest.mark.parametrize("setting", ["large", "ca_bundle"])
@pytest.mark.parametrize("source", ["file", "environment", "flag"])
def test_an_error_about_a_value_names_the_source_that_set_it(
    setting: str,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, value = tmp_path / "config.toml", "htp:/x"
    lines = ['large = "http://127.0.0.1:9/v1"'] if setting == "ca_bundle" else []
    in_file, variable = f"{setting} in the config file {config}", f"MLXROUTE_{setting.upper()}"
    flags: list[str] = []
    match source:
        case "file":
            lines.append(f'{setting} = "{value}"')
        case "environment":
            monkeypatch.setenv(variable, value)
        case _:
            flags = [f"--{setting.replace('_', '-')}", value]
    config.write_text("\n".join(lines))
    monkeypatch.setenv("MLXROUTE_CONFIG", str(config))
    # Without a command, a chat starts.
    for arguments in (["ask", *flags, "hi"], ["chat", *flags] if flags else []):
        assert main(arguments) == 2
        shown = capsys.readouterr().err
        assert value in shown
        assert (f"({in_file})" in shown) == (source == "file")
        assert (f"({variable})" in shown) == (source == "environment")
    if not flags:
        settings = load_settings({}, environ=os.environ, path=config)
        place = in_file if source == "file" else variable
        assert _check_large(settings, Console()).finding.endswith(f"({place})")


@pytest.mark.parametrize("name", ["entropy", "margin", "logu", "random"])
def test_without_a_large_model_the_chosen_router_scores_and_never_escalates(name: str) -> None:
    ranks = ScoreRanks("tiny", "none", 0, {})
    rule = RoutingRule(make_router(name, budget=0.07), ranks, has_large=False)
    assert (rule.router.name, rule.name) == (name, name)
    assert rule.threshold == float("inf")
