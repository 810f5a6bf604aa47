"""The user's folders, where no home folder is known and where variables are wrong."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from mlxroute.catalog import Catalog
from mlxroute.cli.app import main
from mlxroute.config import default_config_path
from mlxroute.errors import ConfigError, UsageError
from mlxroute.types import no_notice, no_progress
from mlxroute.user_folders import (
    cache_folder,
    check_temporary_folder,
    config_folder,
    expand_user,
    state_folder,
)
from mlxroute.weights import resolve

_VARIABLES = ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "MLXROUTE_CONFIG")


@pytest.fixture
def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(_: object) -> None:
        raise KeyError("uid not found")

    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


@pytest.mark.usefixtures("_no_home")
@pytest.mark.parametrize("home", [None, "", "relative/home"])
def test_without_a_home_folder_the_error_names_the_variables(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    for folder in (config_folder, cache_folder, state_folder, lambda: expand_user("~/key")):
        with pytest.raises(ConfigError, match="set HOME, or XDG_CONFIG_HOME, XDG_CACHE_HOME"):
            folder()


@pytest.mark.usefixtures("_no_home")
def test_a_command_without_a_home_folder_fails_with_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["models", "--cache-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no home folder: ")


def test_relative_xdg_variables_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, "relative")
    for folder in (config_folder(), cache_folder(), state_folder()):
        assert folder.is_absolute()
        assert tmp_path in folder.parents


def test_a_tilde_is_expanded_and_an_unknown_user_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLXROUTE_CONFIG", "~/own.toml")
    assert expand_user("~") == tmp_path
    assert expand_user("~/a/b") == tmp_path / "a" / "b"
    assert expand_user("a/~b") == Path("a/~b")
    assert default_config_path() == tmp_path / "own.toml"
    with pytest.raises(UsageError, match="there is no user 'nobody-of-this-name'"):
        expand_user("~nobody-of-this-name/a")
    with pytest.raises(UsageError, match="cannot contain a NUL character"):
        expand_user("a\0b")


def test_a_file_or_a_model_in_the_folder_of_an_unknown_user_is_refused(tmp_path: Path) -> None:
    unknown = "~nobody-of-this-name/a"
    with pytest.raises(UsageError, match="there is no user 'nobody-of-this-name'"):
        expand_user(Path(unknown))
    with pytest.raises(UsageError, match="there is no user 'nobody-of-this-name'"):
        resolve(
            unknown,
            catalog=Catalog.load(),
            cache_dir=tmp_path,
            offline=True,
            progress=no_progress,
            notify=no_notice,
        )


@pytest.mark.parametrize("path", ["", "/nonexistent"])
def test_a_missing_temporary_folder_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("TMPDIR", path)
    with pytest.raises(ConfigError, match="TMPDIR must name a folder"):
        check_temporary_folder()
    monkeypatch.setenv("TMPDIR", os.curdir)
    check_temporary_folder()


def test_a_config_file_that_is_named_must_exist(tmp_path: Path) -> None:
    environ = {**os.environ, "MLXROUTE_CONFIG": str(tmp_path / "none.toml")}
    process = subprocess.run(
        [sys.executable, "-m", "mlxroute", "models"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.endswith("none.toml cannot be read: No such file or directory")
