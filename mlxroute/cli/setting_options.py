"""Options of commands, made from the declared settings."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any

import typer

from mlxroute.cli.error_advice import named_origins
from mlxroute.cli.shell_completion import complete_model
from mlxroute.config import Settings, default_config_path, load_settings, parse_share
from mlxroute.config.declarations import Setting
from mlxroute.config.settings import declared_settings, replace_escapes
from mlxroute.errors import ConfigError

LoadSettings = Callable[[Mapping[str, Any]], Settings]
"""Makes settings from the flags of a command; a flag of None is not set."""


def load_all_settings(flags: Mapping[str, Any]) -> Settings:
    """Return the settings of the flags, the environment and the config file."""
    return load_settings(flags, environ=os.environ, path=default_config_path())


def with_setting_options(
    run: Callable[..., int], command: str, *, load: LoadSettings = load_all_settings
) -> Callable[..., None]:
    """Return `run` as a function for typer, with an option for each setting of the command.

    Args:
        run: Takes the merged settings as `settings` beside its own parameters; returns the exit
            code. An argument (not an option) with the name of a setting also counts as its flag.
        command: Name of the command in the declarations, such as `bench speed`.
        load: Makes the settings from the flags. Merges all sources by default.
    """
    options = {
        name: _option(setting)
        for name, setting in declared_settings().items()
        if command in setting.commands
    }
    signature = inspect.signature(run, eval_str=True)
    own = [item for name, item in signature.parameters.items() if name != "settings"]
    settings_among_own = [item.name for item in own if _is_setting(item)]

    def invoke(**arguments: Any) -> None:
        flags = {name: replace_undecodable(arguments.pop(name)) for name in options}
        flags |= {name: arguments[name] for name in settings_among_own}
        settings = load(flags)
        # A setting of the same name as an option that is the command's own is not used.
        origins = {key: place for key, place in settings.origins.items() if key not in arguments}
        with named_origins(origins):
            code = run(settings=settings, **arguments)
        raise typer.Exit(code)

    invoke.__doc__ = run.__doc__
    invoke.__annotations__ = {}
    invoke.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*_keyword_only(own), *options.values()], return_annotation=None
    )
    return invoke


def replace_undecodable(value: Any) -> Any:
    """Return a flag's value with bytes that are not UTF-8 replaced, and a list as a tuple."""
    if isinstance(value, list):
        return tuple(replace_undecodable(item) for item in value)
    if isinstance(value, str):
        return value.encode(errors="surrogateescape").decode(errors="replace")
    return value


def parse_budget(text: str) -> float:
    """Parse a share; raise the error that typer shows with the name of the option."""
    try:
        return parse_share(text)
    except ConfigError as exc:
        raise typer.BadParameter(str(exc)) from exc


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Return whether a parameter of a command is an argument with the name of a setting."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    is_argument = any(isinstance(item, typer.models.ArgumentInfo) for item in metadata)
    return is_argument and parameter.name in declared_settings()


def _keyword_only(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in parameters]


@cache
def _option(setting: Setting) -> inspect.Parameter:
    """Return the parameter from which typer makes the option; its default None means not set."""
    annotation: Any = setting.choices or setting.kind
    if setting.kind is tuple:
        annotation = list[str]
    option = typer.Option(
        setting.flag,
        help=_help(setting),
        metavar=setting.metavar,
        parser=_parser(setting),
        autocompletion=complete_model if setting.name == "small" else None,
    )
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation | None, option],
    )


def _help(setting: Setting) -> str:
    """Return the help of a setting with its default, in the form of typer's own options."""
    if setting.kind is bool or setting.default in (None, ()):
        return setting.help
    default = f"{setting.default:g}" if setting.kind is float else setting.default
    return f"{setting.help}  [default: {default}]"


def _parser(setting: Setting) -> Callable[[str], Any] | None:
    if setting.is_share:
        return parse_budget
    if setting.has_escapes:
        return replace_escapes
    return parse_number if setting.is_unbounded else None


def parse_number(text: str) -> float:
    """Parse a number, inf or -inf; raise the error that typer shows with the name of the option."""
    try:
        return float(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a number, inf or -inf") from exc
