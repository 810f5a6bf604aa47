"""Error messages for users of the command line: library errors with the flag that helps."""

from __future__ import annotations

from mlxroute.config.settings import declared_settings
from mlxroute.errors import ContextTooLong, MlxRouteError

# Parameters of the library that are not settings, or whose settings have other names.
_OTHER_FLAGS = {
    "timeout_s": "--timeout",
    "model": "--large-model",
    "html": "--html",
    "svg": "--svg",
    "plot": "--plot",
    "question": "--question",
    "learning_rate": "--learning-rate",
}

_LONG_CHAT = "; /reset starts a new conversation"
_LONG_PROMPT = ", or choose a small model with a longer context (--small)"


def error_message(error: MlxRouteError, *, in_chat: bool = False) -> str:
    """Return the error's text with the flag that sets the parameter it names.

    The flag replaces the parameter at the start of the text and otherwise follows the text. With
    `in_chat`, the advice may be a command of the chat.
    """
    text, parameter = str(error), error.parameter
    if isinstance(error, ContextTooLong):
        return text + (_LONG_CHAT if in_chat else _LONG_PROMPT)
    flag = None if parameter is None else _flag(parameter)
    if flag is None:
        return text
    if text.startswith(f"{parameter} "):
        return text.replace(str(parameter), flag, 1)
    return f"{text} ({flag})"


def _flag(parameter: str) -> str | None:
    setting = declared_settings().get(parameter)
    return _OTHER_FLAGS.get(parameter) if setting is None else setting.flag
