"""How a setting is declared, and what follows from its declaration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_type_hints

_VARIABLE_PREFIX = "MLXROUTE_"

_Value = TypeVar("_Value")


def setting(
    default: _Value,
    text: str,
    *,
    metavar: str | None = None,
    commands: Sequence[str] = (),
    variable: str | None = None,
    choices: type[StrEnum] | None = None,
    form: Literal["share", "unbounded", "escapes"] | None = None,
) -> _Value:
    """Declare a setting.

    Args:
        default: Its value where no source sets it.
        text: Its help.
        metavar: Placeholder for its value in the help. None (default) for typer's own.
        commands: Commands that take its flag. Empty (default) for a setting of the config file and
            the environment only.
        variable: A second environment variable, read if its own is not set. None by default.
        choices: Values that it accepts. None (default) for any of its type.
        form: How it may be written beside the form of its type, which is all by default (None): a
            share as `7%` or `0.07`, an unbounded number as inf or -inf, or a text with the escapes
            `\\n`, `\\t` and `\\\\`, as in TOML.
    """
    metadata = {
        "help": text,
        "metavar": metavar,
        "commands": tuple(commands),
        "second_variable": variable,
        "choices": choices,
        "is_share": form == "share",
        "is_unbounded": form == "unbounded",
        "has_escapes": form == "escapes",
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Setting:
    """A declared setting, from which flags, environment variables and documentation are made.

    Args:
        name: Name of the field of `Settings`, and its key in the config file.
        kind: bool, int, float, str, or tuple for a list of texts.
        default: Value where no source sets it.
        help: Help text of its flag.
        metavar: Placeholder for its value in the help; None for typer's own.
        commands: Commands that take its flag.
        variables: Environment variables to read; the first that is present counts.
        choices: Values that it accepts; None for any of its type.
        is_share: Whether it may be written as `7%` or `0.07`.
        is_unbounded: Whether it may be inf or -inf.
        has_escapes: Whether `\\n`, `\\t` and `\\\\` stand for other characters, as they do in TOML.
    """

    name: str
    kind: type
    default: Any
    help: str
    metavar: str | None
    commands: tuple[str, ...]
    variables: tuple[str, ...]
    choices: type[StrEnum] | None
    is_share: bool
    is_unbounded: bool
    has_escapes: bool

    @property
    def flag(self) -> str:
        """The option that sets it on the command line."""
        return f"--{self.name.replace('_', '-')}"


def read_declarations(settings: type) -> dict[str, Setting]:
    """Return the settings that a dataclass declares, by name and in their order."""
    annotations = get_type_hints(settings)
    declared = {}
    for item in fields(settings):
        if not (metadata := dict(item.metadata)):
            continue
        own, second = f"{_VARIABLE_PREFIX}{item.name.upper()}", metadata.pop("second_variable")
        declared[item.name] = Setting(
            name=item.name,
            kind=_kind(annotations[item.name]),
            default=item.default,
            variables=(own, second) if second else (own,),
            **metadata,
        )
    return declared


def _kind(annotation: Any) -> type:
    """Return the type of a value that is set: `float` for `float | None`."""
    if isinstance(annotation, UnionType):
        (annotation,) = (member for member in get_args(annotation) if member is not type(None))
    return tuple if get_args(annotation) else annotation
