"""The options of one answer, and their limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from mlxroute.engine.experience import Experience
from mlxroute.errors import UsageError
from mlxroute.types import Mode, Prices, Sampling
from mlxroute.types.limits import check_number, shown_value


def _has(method: str) -> Callable[[object], bool]:
    """Return a check for an object, not a class, with this method."""
    return lambda value: hasattr(value, method) and not isinstance(value, type)


# For each argument that is an object: what accepts a value other than None, and what it must be.
_KINDS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "small": (_has("prefill"), 'a SmallModel, such as SmallModel.load("NAME")'),
    "large": (_has("begin"), 'a LargeModel, such as LargeModel("URL"), or None'),
    "router": (_has("score"), "a router, such as EntropyRouter()"),
    "prices": (
        lambda value: isinstance(value, Prices),
        "Prices(input=..., cached_input=..., output=...) or None",
    ),
    "experience": (lambda value: isinstance(value, Experience), "an Experience or None"),
    "on_failure": (callable, "a function of a CallFailure"),
}
_OPTIONAL: Final = {"large", "prices", "experience"}


def check_kinds(**arguments: object) -> None:
    """Raise UsageError, with the parameter's name, for an argument of another kind."""
    for name, value in arguments.items():
        is_accepted, words = _KINDS[name]
        if not (is_accepted(value) or (value is None and name in _OPTIONAL)):
            # The value itself is not shown: an address may hold a password.
            kind = type(value).__name__
            raise UsageError(f"{name} must be {words}, not of type {kind}", parameter=name)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one answer; see `generate` for their meaning.

    Raises UsageError, with the parameter's name, for a value out of range or of another form. One
    text is one stop text, and a mode may be given by its name.
    """

    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    timeout_s: float = 30.0
    strict: bool = False
    never_send: tuple[re.Pattern[str], ...] = ()
    prices: Prices | None = None
    mode: Mode = Mode.AUTO
    prefetch: int | None = None
    call_ceiling: float | None = None
    accept_within: float = 0.0

    def __post_init__(self) -> None:
        check_number("max_tokens", self.max_tokens)
        check_number("timeout_s", self.timeout_s, limits="timeout")
        for name in ("temperature", "top_p", "top_k", "min_p"):
            check_number(name, getattr(self.sampling, name))
        check_number("accept_within", self.accept_within)
        for name in ("prefetch", "call_ceiling"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.sampling.seed is not None:
            check_number("seed", self.sampling.seed)
        check_kinds(prices=self.prices)
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "never_send", _patterns(self.never_send))
        object.__setattr__(self, "mode", parse_mode(self.mode))


def _stop_texts(value: object) -> tuple[str, ...]:
    """Return stop texts as a tuple. Raises UsageError."""
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, Iterable):
        texts = tuple(texts)
        if all(isinstance(text, str) for text in texts):
            return texts
    raise UsageError(
        f"stop must be a text or a list of texts, not {shown_value(value)}", parameter="stop"
    )


def _patterns(value: object) -> tuple[re.Pattern[str], ...]:
    """Return never-send patterns as a tuple. Raises UsageError, which does not show them."""
    if isinstance(value, Iterable):
        patterns = tuple(value)
        if all(isinstance(item, re.Pattern) and isinstance(item.pattern, str) for item in patterns):
            return patterns
    raise UsageError(
        'never_send must be a list of compiled patterns, such as [re.compile("...")]',
        parameter="never_send",
    )


def parse_mode(name: str) -> Mode:
    """Return the mode with this name. Raises UsageError."""
    try:
        return Mode(name)
    except ValueError as exc:
        raise UsageError(
            f"unknown mode {name!r}; choose one of {', '.join(Mode)}", parameter="mode"
        ) from exc
