"""System messages for servers whose chat template refuses them."""

from __future__ import annotations

from dataclasses import replace

from mlxroute.errors import LargeRefused
from mlxroute.large.dialects.tokenize_routes import TEMPLATE_STATUSES
from mlxroute.large.prompt import Prompt
from mlxroute.messages import fold_system


class SystemRole:
    """Whether one server takes system messages, learned from its refusals."""

    def __init__(self) -> None:
        self._is_refused = False

    def adapt(self, prompt: Prompt) -> Prompt:
        """Return the prompt, without a system message if the server refuses those."""
        return _without_system(prompt) if self._is_refused else prompt

    def after_refusal(self, prompt: Prompt, refusal: LargeRefused) -> Prompt | None:
        """Return the prompt to try after a refusal; None if it cannot be due to the system role."""
        folded = _without_system(prompt)
        return folded if folded != prompt and refusal.status in TEMPLATE_STATUSES else None

    def record_accepted(self) -> None:
        """Record that the server took a prompt that it had refused with a system message."""
        self._is_refused = True


def _without_system(prompt: Prompt) -> Prompt:
    if not any(message["role"] == "system" for message in prompt.messages):
        return prompt
    return replace(prompt, messages=tuple(fold_system(prompt.messages)))
