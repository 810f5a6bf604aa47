"""The documentation page of all settings.

`python -m mlxroute.config.settings_page` prints it.
"""

from __future__ import annotations

import sys

from mlxroute.config.declarations import Setting
from mlxroute.config.settings import declared_settings

_HEAD = """\
# Settings

A setting has three sources: the config file, an environment variable and a flag. Each overrides
those before it.

The config file is `config.toml` in the platform's config folder: `~/.config/mlxroute/` on Linux,
`~/Library/Application Support/mlxroute/` on a Mac. `MLXROUTE_CONFIG` names another file, which must
then exist. `mlxroute doctor` prints the path and checks the file. Its keys are the names in the
first column:
```toml
small = "qwen2.5-coder-0.5b"
large = "http://my-box:8000/v1"
budget = "5%"
never_send = ["(?i)project zebra"]
```
- A `threshold` replaces the `budget` of an earlier source, and a `budget` the `threshold`.
- A `key_file` replaces the `key_env` of an earlier source, and a `key_env` the `key_file`.
- A `head` replaces the `router` of an earlier source. The head is then the router; a source that
  sets a `head` can set no `router` but `head`.
- Another `large` than that of an earlier source removes the `large_model` and the prices of earlier
  sources, because they belong to their server. The `ca_bundle` stays, as a company's authorities
  are often those of all its servers; a certificate of another authority is refused.
- The values of `never_send` and `never_send_file` from all sources add up.
- `--budget`, `--threshold` and `--mode` of `replay`, `--budget` and `--router` of `bench quality`,
  and `--port` of `host` are flags only; no other source sets them.
- In the environment, a switch is `1`, `true`, `0` or `false`, and a list has one text.
- Config files, key files, never-send files and question files are UTF-8, with or without a byte
  order mark; lines end at `\\n`.
- Without a home folder (no `HOME`, and no entry in the password database), set `HOME`, or
  `XDG_CONFIG_HOME`, `XDG_CACHE_HOME` and `XDG_STATE_HOME`.

| setting | type | default | flag of | environment | meaning |
|---|---|---|---|---|---|
"""


def settings_page() -> str:
    """Return docs/settings.md: one row for each declared setting."""
    return _HEAD + "".join(_row(setting) for setting in declared_settings().values())


def _row(setting: Setting) -> str:
    flag = f"`{setting.flag}`: {_commands(setting)}" if setting.commands else "none"
    variables = ", ".join(f"`{name}`" for name in setting.variables)
    cells = (f"`{setting.name}`", _type(setting), _default(setting), flag, variables, setting.help)
    return f"| {' | '.join(cells)} |\n"


def _commands(setting: Setting) -> str:
    every = {command for other in declared_settings().values() for command in other.commands}
    is_everywhere = set(setting.commands) == every
    # `show` alone takes no settings.
    return "every command except `show`" if is_everywhere else ", ".join(setting.commands)


def _type(setting: Setting) -> str:
    if setting.choices is not None:
        return ", ".join(f"`{name}`" for name in setting.choices)
    if setting.is_share:
        return "share, `7%` or `0.07`"
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return names.get(setting.kind, "list of texts")


def _default(setting: Setting) -> str:
    if setting.kind is bool:
        return str(setting.default).lower()
    return "none" if setting.default in (None, ()) else f"`{setting.default}`"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
