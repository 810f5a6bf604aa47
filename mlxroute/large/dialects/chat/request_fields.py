"""The optional fields of chat requests, and which of them a server takes.

Servers refuse fields that others need: `max_tokens` or its newer name, a temperature, logprobs,
a switch for thinking. What a server takes follows from its refusals and replies, not from its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, Self

from mlxroute.large.dialects.base import NO_THINKING, RequestOptions

MAX_GENERATED_PER_TOKEN: Final = 64
"""Generated tokens, thinking included, that one token of an answer may cost."""
REFUSALS: Final = frozenset({400, 403, 422})
"""Statuses of refused fields; 403 is the answer to logprobs that a model may not give."""
_SMALL_BUDGET: Final = 16
_LIMIT_NAMES: Final = ("max_tokens", "max_completion_tokens")
# Where a reply has no room: more tokens than one must be asked for.
_TOO_FEW: Final = re.compile(r"output limit was reached|below minimum|>= ?[0-9]|at least [0-9]")
_QUOTED: Final = re.compile(r"['\"`]([a-z]+)['\"`]")


_NOTHING: Final[Mapping[str, object]] = {}
# With Mistral's own tokenizers, vLLM refuses all variables of a template by this name.
_TEMPLATE: Final = "chat_template"


class Thinking(Enum):
    """A way to ask a model to think little before it answers, or not at all."""

    UNSET = ("", _NOTHING)
    NONE = ("effort none", {"reasoning_effort": "none"})
    DISABLED = ("thinking disabled", {"thinking": {"type": "disabled"}})
    TEMPLATE = ("thinking off in the template", NO_THINKING)
    MINIMAL = ("effort minimal", {"reasoning_effort": "minimal"})
    LOW = ("effort low", {"reasoning_effort": "low"})

    def __init__(self, label: str, body: Mapping[str, object]) -> None:
        self.label = label
        self.body = body

    @property
    def effort(self) -> str:
        """The value of `reasoning_effort`; empty for other ways."""
        return str(self.body.get("reasoning_effort", ""))

    def is_named_in(self, text: str) -> bool:
        """Return whether a text has the name of the field, as a refusal of it has."""
        is_template = self is Thinking.TEMPLATE
        return _names(text, *self.body, *([_TEMPLATE] if is_template else []))


_UNSET: Final = Thinking.UNSET
_SWITCHES: Final = (Thinking.NONE, Thinking.DISABLED)


@dataclass(frozen=True, slots=True)
class RequestFields:
    """The optional fields of a chat request.

    Args:
        limit_name: The field that limits the generated tokens.
        temperature: Whether a temperature of 0 is asked for; without it tokens are sampled.
        logprobs: Whether logprobs are asked for.
        thinking: How the model is asked to think little.
        least_tokens: The number of tokens to ask for at least.
    """

    limit_name: str = _LIMIT_NAMES[0]
    temperature: bool = True
    logprobs: bool = True
    thinking: Thinking = _UNSET
    least_tokens: int = 1

    def body(self, options: RequestOptions, *, logprobs: bool) -> dict[str, object]:
        """Return these fields of a request; without `logprobs` it asks for none in any case."""
        body: dict[str, object] = {self.limit_name: max(options.max_tokens, self.least_tokens)}
        if self.temperature:
            body["temperature"] = 0
        if self.logprobs and logprobs:
            body |= {"logprobs": True, "top_logprobs": options.top_logprobs}
        return body | dict(self.thinking.body)

    def rename_limit(self, body: Mapping[str, object]) -> dict[str, object]:
        """Return a request with its limit of tokens, if it has a single one, as `limit_name`."""
        limits = [body[name] for name in _LIMIT_NAMES if body.get(name) is not None]
        if len(limits) != 1:
            return dict(body)
        others = {name: value for name, value in body.items() if name not in _LIMIT_NAMES}
        return others | {self.limit_name: limits[0]}

    def describe(self) -> str:
        """Return how the fields differ from the usual ones; empty if they do not."""
        return ", ".join(label for label, change in _LABELS.items() if self._has(change))

    @classmethod
    def parse(cls, description: str) -> Self | None:
        """Return the fields that `describe` described; None if it did not write the text."""
        labels = description.split(", ") if description else []
        if not set(labels) <= _LABELS.keys():
            return None
        changes: dict[str, Any] = {}
        for label in labels:
            changes |= _LABELS[label]
        parsed = cls(**changes)
        return parsed if parsed.describe() == description else None

    def _has(self, change: Mapping[str, object]) -> bool:
        return all(getattr(self, name) == value for name, value in change.items())


# The words that describe a field which differs from the usual one.
_LABELS: Final[Mapping[str, Mapping[str, Any]]] = {
    _LIMIT_NAMES[1]: {"limit_name": _LIMIT_NAMES[1]},
    "no temperature": {"temperature": False},
    "no logprobs": {"logprobs": False},
    **{way.label: {"thinking": way} for way in Thinking if way is not _UNSET},
    **{
        f"{count} tokens or more": {"least_tokens": count}
        for count in (_SMALL_BUDGET, MAX_GENERATED_PER_TOKEN)
    },
}


class FieldSearch:
    """Finds the fields that a server takes, one change for each refusal or reply that needs it.

    `fields` are the ones to use now. Every change is made once, so a search ends.
    """

    def __init__(self) -> None:
        self.fields = RequestFields()
        self._untried: list[Thinking] = [way for way in Thinking if way is not _UNSET]
        self._ignored: list[Thinking] = []
        self.thinks = False
        """Whether a reply was seen whose tokens were all thoughts."""

    def after_refusal(self, text: str) -> RequestFields | None:
        """Return fields that avoid a refusal, whose text names a field; None if none do."""
        now = self.fields
        if all(_names(text, name) for name in (now.limit_name, "temperature", "logprobs")):
            # The text repeats the request, and says nothing about a field.
            return None
        if _TOO_FEW.search(text) and _names(text, *_LIMIT_NAMES, "max_output_tokens"):
            if now.least_tokens >= _SMALL_BUDGET:
                return self.after_thinking()
            return self._use(least_tokens=_SMALL_BUDGET)
        if now.limit_name == _LIMIT_NAMES[0] and _names(text, now.limit_name):
            return self._use(limit_name=_LIMIT_NAMES[1])
        for name in ("logprobs", "temperature"):
            if getattr(now, name) and _names(text, name, f"top_{name}"):
                # Models that think take neither, unless they are asked not to think.
                if now.thinking is _UNSET and (way := self._untried_switch()):
                    return self._try(way)
                return self._use(**{name: False})
        if now.thinking is _UNSET:
            return None
        # Some servers say what they refuse in words of their own, and this way was added last.
        self._drop_refused(text)
        if self.thinks:
            return self._next_way()
        return self._try(way) if (way := self._untried_switch()) else self._use(thinking=_UNSET)

    def after_thinking(self) -> RequestFields | None:
        """Return fields with which the model may think less; None if one token costs too much."""
        self.thinks = True
        self._ignored.append(self.fields.thinking)
        return self._next_way()

    def _next_way(self) -> RequestFields | None:
        if self._untried:
            return self._try(self._untried[0])
        if self.fields.least_tokens >= MAX_GENERATED_PER_TOKEN:
            return None
        # With so few tokens a little thinking looked like much.
        cheapest = (Thinking.MINIMAL, Thinking.LOW, Thinking.NONE)
        way = next((way for way in cheapest if way in self._ignored), _UNSET)
        return self._use(thinking=way, least_tokens=MAX_GENERATED_PER_TOKEN)

    def _drop_refused(self, text: str) -> None:
        """Try only efforts that a refusal offers, and none if it refuses the field."""
        refused = self.fields.thinking.effort
        offered = {way.effort for way in Thinking} & set(_QUOTED.findall(text)) - {refused}
        is_refused = _names(text, "reasoning_effort") and "value" not in text.lower()
        if refused and (offered or is_refused):
            self._untried = [
                way for way in self._untried if not way.effort or way.effort in offered
            ]

    def _untried_switch(self) -> Thinking | None:
        """Return a way to switch off thinking in a model that was not seen to think, or None."""
        return next((way for way in _SWITCHES if way in self._untried), None)

    def _try(self, way: Thinking) -> RequestFields:
        self._untried.remove(way)
        return self._use(thinking=way)

    def _use(self, **changes: Any) -> RequestFields:
        self.fields = replace(self.fields, **changes)
        return self.fields


def names_field(text: str) -> bool:
    """Return whether a text has the name of an optional field, as a refusal of it has."""
    names = [name for way in Thinking for name in way.body]
    return _names(text, *_LIMIT_NAMES, "temperature", "logprobs", "top_logprobs", *names)


def _names(text: str, *names: str) -> bool:
    """Return whether a text has one of these names of fields, in snake case or in camel case."""
    forms = [re.escape(name) for name in names]
    forms += [re.sub(r"_([a-z])", lambda match: match[1].upper(), name) for name in names]
    return bool(names) and bool(re.search(rf"\b(?:{'|'.join(forms)})\b", text, re.IGNORECASE))
