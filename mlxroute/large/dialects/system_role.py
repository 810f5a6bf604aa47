"""System messages for servers whose chat template refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from mlxroute.errors import LargeRefused
from mlxroute.large.dialects.tokenize_routes import TEMPLATE_STATUSES
from mlxroute.large.prompt import Prompt
from mlxroute.messages import fold_system

_T = TypeVar("_T")


class SystemRole:
    """Whether one server takes system messages, learned from its refusals."""

    def __init__(self) -> None:
        self._is_refused = False

    def send(self, prompt: Prompt, send: Callable[[Prompt], _T]) -> _T:
        """Send a prompt; if it is refused, send it without a system message, and so from then on.

        Raises what `send` raises.
        """
        folded = _without_system(prompt)
        if self._is_refused:
            return send(folded)
        try:
            return send(prompt)
        except LargeRefused as exc:
            if folded == prompt or exc.status not in TEMPLATE_STATUSES:
                raise
        reply = send(folded)
        self._is_refused = True
        return reply


def _without_system(prompt: Prompt) -> Prompt:
    if not any(message["role"] == "system" for message in prompt.messages):
        return prompt
    return replace(prompt, messages=tuple(fold_system(prompt.messages)))
