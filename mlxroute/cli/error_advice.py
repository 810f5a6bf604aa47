"""Error messages for users of the command line, with the flag that helps or the value's source."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from mlxroute.config.settings import declared_settings
from mlxroute.errors import ContextTooLong, MlxRouteError
from mlxroute.types.limits import shown_value

# Parameters of the library whose settings have other names.
_SETTING_NAMES = {"timeout_s": "timeout", "model": "large_model"}
# The same, of errors that name no flag because they repeat the value.
_NAMES_OF_SHOWN = {"base_url": "large"}
# Parameters that are not settings.
_OTHER_FLAGS = {
    "html": "--html",
    "majority": "--majority",
    "out": "--out",
    "save": "--save",
    "svg": "--svg",
    "plot": "--plot",
    "question": "--question",
    "learning_rate": "--learning-rate",
    "questions": "--questions",
    "tokens": "--tokens",
}

# What a flag must be, by the type of the error with which pydantic refuses it for typer.
_NUMBER_WORDS = {
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "float_parsing": "a number",
}
_RANGE_TYPES = ("greater_than_equal", "less_than_equal")

_LONG_CHAT = "; /reset starts a new conversation"
_LONG_PROMPT = ", or choose a small model with a longer context (--small)"


def error_message(
    error: MlxRouteError, *, in_chat: bool = False, flags: Collection[str] | None = None
) -> str:
    """Return the error's text with the flag that sets the parameter it names.

    The flag replaces the parameter at the start of the text and otherwise follows the text. With
    `in_chat`, the advice may be a command of the chat. Where the flag is not among `flags`,
    those of the command (None: all), the environment variable is named.
    """
    text, parameter = str(error), error.parameter
    if isinstance(error, ContextTooLong):
        return text + (_LONG_CHAT if in_chat else _LONG_PROMPT)
    flag = None if parameter is None else _flag(parameter, flags)
    if flag is None:
        return text
    if text.startswith(f"{parameter} "):
        return text.replace(str(parameter), flag, 1)
    return f"{text} ({flag})"


@contextmanager
def named_origins(origins: Mapping[str, str]) -> Iterator[None]:
    """Add to the text of an error in the block where the setting that it names was set.

    `origins` are the places, by setting; an error about another setting is left as it is.
    """
    try:
        yield
    except MlxRouteError as exc:
        parameter = exc.parameter or ""
        names = _SETTING_NAMES | _NAMES_OF_SHOWN
        origin = origins.get(names.get(parameter, parameter))
        if origin is not None:
            exc.args, exc.parameter = (f"{exc} ({origin})",), None
        raise


def usage_message(error: typer.TyperException) -> str:
    """Return the text of an error of typer; one about a number reads as those of the library."""
    param: Any = getattr(error, "param", None)
    problems = getattr(error.__cause__, "errors", None)
    if param is not None and problems is not None:
        problem = problems()[0]
        kind, value = problem["type"], shown_value(problem["input"])
        if kind in _NUMBER_WORDS:
            return f"{param.opts[0]} must be {_NUMBER_WORDS[kind]}, not {value}"
        if kind in _RANGE_TYPES:
            declared = param.type_descriptor.parameter_info
            # The input is the text of a number.
            number = value.replace("'", "")
            return f"{param.opts[0]} must be {_range(declared.min, declared.max)}, not {number}"
    return str(error.format_message()).replace("Value error, ", "")


def _range(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return f"at least {low}" if high is None else f"at most {high}"
    return f"from {low} to {high}"


def _flag(parameter: str, flags: Collection[str] | None) -> str | None:
    setting = declared_settings().get(_SETTING_NAMES.get(parameter, parameter))
    if setting is None:
        return _OTHER_FLAGS.get(parameter)
    return setting.flag if flags is None or setting.flag in flags else setting.variables[0]
