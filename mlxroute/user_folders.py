"""The user's folders: home, configuration, cache, state, and temporary files."""

from __future__ import annotations

import os
from pathlib import Path

from mlxroute.errors import ConfigError, UsageError

_APP = "mlxroute"
# In the order in which C++ reads them.
_TEMPORARY_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")


def config_folder() -> Path:
    """Return the folder of the config file. Raises ConfigError where no home folder is known."""
    return _platform_folder("config")


def cache_folder() -> Path:
    """Return the folder of the weights. Raises ConfigError where no home folder is known."""
    return _platform_folder("cache")


def state_folder() -> Path:
    """Return the folder of the chat history. Raises ConfigError where no home folder is known."""
    return _platform_folder("state")


def expand_user(path: str | Path) -> Path:
    """Return a path that a user named, with `~` or `~user` at its start replaced by a home folder.

    Raises:
        UsageError: There is no such user, or the path contains a NUL character.
        ConfigError: No home folder is known.
    """
    text = str(path)
    if "\0" in text:
        raise UsageError("the name of a file or a folder cannot contain a NUL character")
    name = text.split("/", 1)[0]
    if not name.startswith("~"):
        return Path(text)
    if name == "~":
        return Path(_home(), text[1:].lstrip("/"))
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise UsageError(f"{text}: there is no user {name[1:]!r}")
    return Path(expanded)


def check_temporary_folder() -> None:
    """Raise ConfigError if the folder for temporary files, which MLX needs, does not exist."""
    variable = next((name for name in _TEMPORARY_VARIABLES if name in os.environ), None)
    if variable is not None and not os.path.isdir(os.environ[variable]):
        raise ConfigError(
            f"the environment variable {variable} must name a folder, not"
            f" {os.environ[variable]!r}; set it to one, or unset it"
        )


def _home() -> Path:
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        import pwd

        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise _no_home()
    return Path(home)


def _platform_folder(kind: str) -> Path:
    import platformdirs

    folders = {
        "config": platformdirs.user_config_path,
        "cache": platformdirs.user_cache_path,
        "state": platformdirs.user_state_path,
    }
    try:
        folder = folders[kind](_APP, appauthor=False)
    except RuntimeError as exc:
        raise _no_home() from exc
    # Earlier versions of platformdirs return `~/.config` where no home folder is known.
    if not folder.is_absolute():
        raise _no_home()
    return folder


def _no_home() -> ConfigError:
    return ConfigError(
        f"no home folder: HOME names none, and user {os.getuid()} is not in the password database;"
        " set HOME, or XDG_CONFIG_HOME, XDG_CACHE_HOME and XDG_STATE_HOME"
    )
