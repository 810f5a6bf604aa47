"""System messages for servers whose chat template refuses them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

from mlxroute.errors import LargeRefused
from mlxroute.large.dialects.tokenize_routes import TEMPLATE_STATUSES
from mlxroute.large.prompt import Prompt
from mlxroute.messages import fold_system

_T = TypeVar("_T")
_MIN_REFUSALS: Final = 2
# What templates and servers say about the role: "System role not supported".
_ABOUT_SYSTEM: Final = re.compile(r"\bsystem\b|\btemplate\b|\brole", re.IGNORECASE)


def refuses_system(error: LargeRefused) -> bool:
    """Return whether a server refuses a request for its system message, by its own words."""
    is_status = error.status in TEMPLATE_STATUSES and not error.is_too_long
    return is_status and _ABOUT_SYSTEM.search(str(error)) is not None


class SystemRole:
    """Whether one server takes system messages, learned from its refusals."""

    def __init__(self) -> None:
        self._server: object = None
        self._is_refused = self._is_taken = False

    def send(self, prompt: Prompt, send: Callable[[Prompt], _T], *, server: object) -> _T:
        """Send a prompt; if it is refused, send it without a system message, and so from then on.

        It has to be refused twice, and by a server that has never taken a system message: another
        form of the conversation changes the answer. Everything is forgotten when `server` is
        another object than before. Raises what `send` raises.
        """
        if server is not self._server:
            self._server, self._is_refused, self._is_taken = server, False, False
        folded = _without_system(prompt)
        if self._is_refused:
            return send(folded)
        has_system = folded != prompt
        for _ in range(_MIN_REFUSALS):
            try:
                reply = send(prompt)
            except LargeRefused as exc:
                if not has_system or self._is_taken or exc.status not in TEMPLATE_STATUSES:
                    raise
            else:
                self._is_taken = self._is_taken or has_system
                return reply
        reply = send(folded)
        self._is_refused = True
        return reply


def _without_system(prompt: Prompt) -> Prompt:
    if not any(message["role"] == "system" for message in prompt.messages):
        return prompt
    return replace(prompt, messages=tuple(fold_system(prompt.messages)))
