"""The fields that chat completions and text completions share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

from mlxroute.engine import Options
from mlxroute.routers import Router
from mlxroute.serving.http.api_error import wrong
from mlxroute.serving.http.model_names import ModelNames, ModelRole
from mlxroute.serving.http.parsing.fields import Fields
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.types import Mode, Sampling

MAX_TOP_LOGPROBS: Final = 8
TOOL_FIELDS: Final = ("tools", "functions")
TOOL_CHOICE_FIELDS: Final = ("tool_choice", "function_call")
SCHEMA_FIELDS: Final = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("grammar", "json_schema", "regex", "ebnf"),
)
"""By which servers take a schema, beside `response_format`: vLLM, llama.cpp and SGLang."""
_MAX_STOPS: Final = 16
MAX_TOKENS: Final = 2**31
# What llama.cpp and its clients write for a seed that differs each time.
_RANDOM_SEED: Final = -1
NO_LIMIT: Final = -1
"""What clients of local servers send for no limit of tokens."""
_ROUTED_ONLY: Final = ("budget", "threshold", "mode")
_STREAM_ONLY: Final = ("stream_options", "events")
_UNSUPPORTED: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "send one request for each answer": {"n": (1,), "best_of": (1,)},
    "answers are text": {"modalities": ([], ["text"]), "audio": ()},
}
"""Fields by the reason why they are refused, with values that change nothing."""
_UNSUPPORTED_DECODING: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "tokens are not penalised": {
        **dict.fromkeys(("presence_penalty", "frequency_penalty", "dry_multiplier"), (0,)),
        "repetition_penalty": (1, 0),
        "repeat_penalty": (1,),
        "no_repeat_ngram_size": (0,),
    },
    "logits are not changed": {
        "logit_bias": ({}, []),
        **dict.fromkeys(("bad_words", "allowed_token_ids"), ([],)),
    },
    "the model ends its answer": {"min_tokens": (0,), "ignore_eos": (False,)},
    "use stop": {"stop_token_ids": ([],)},
    "the small model's own is used": {"chat_template": ("",)},
    "answers are decoded once": {"use_beam_search": (False,)},
}
"""The same for fields that the server of a forwarded request may obey."""
_FILTERS: Final = {"typical_p": (1,), "mirostat": (0,)}


@dataclass(frozen=True, slots=True)
class AnswerFields:
    """What a request says about its answers, beside the prompt.

    Args:
        model: The id of the model, as replies name it.
        role: Which models answer.
        options: Limits, sampling and mode.
        budget: The maximum share of escalated tokens; None if it is not set.
        threshold: The score above which tokens are escalated; None if it is not set.
        local_only: Whether nothing may be sent to the large model.
        exact: Whether the text must be the one that the answer has alone.
        stream: Whether the reply is a stream.
        include_usage: Whether a stream ends with its usage.
        events: Whether a stream has provisional tokens and the progress of the prompt.
        ignored: The names of fields that are not known.
    """

    model: str
    role: ModelRole
    options: Options
    budget: float | None
    threshold: float | None
    local_only: bool
    exact: bool
    stream: bool
    include_usage: bool
    events: bool
    ignored: tuple[str, ...] = ()

    def make_router(self, session: ServingSession) -> Router:
        """Return the router of one answer."""
        if self.role is ModelRole.LARGE:
            return session.make_router(None, -math.inf)
        if self.is_local(session):
            return session.make_router(None, math.inf)
        return session.make_router(self.budget, self.threshold)

    def is_local(self, session: ServingSession) -> bool:
        """Return whether the small model answers alone."""
        return self.local_only or self.role is ModelRole.SMALL or session.large is None


def read_common(fields: Fields, session: ServingSession, names: ModelNames) -> AnswerFields:
    """Return the common fields; `ignored` is for the caller to fill in. Raises ApiError."""
    _refuse(fields, _UNSUPPORTED)
    role = names.role(fields.text("model"))
    budget, threshold = fields.share("budget"), fields.score("threshold")
    mode, local_only = fields.choice("mode", Mode), fields.flag("local_only")
    if budget is not None and threshold is not None:
        raise wrong("threshold", "a threshold and a budget exclude each other; send one of them")
    if threshold is not None and math.isnan(threshold):
        raise wrong("threshold", "threshold must be a number")
    if local_only and role is ModelRole.LARGE:
        reason = f"the large model is not on this side; ask {names.id_of(ModelRole.SMALL)} instead"
        raise wrong("local_only", f"local_only excludes {names.id_of(role)}: {reason}")
    # Fields that have no effect must not look as if they had one.
    if role is not ModelRole.ROUTED or local_only or session.large is None:
        for name in _ROUTED_ONLY:
            fields.ignore(name)
        budget = threshold = mode = None
    options = _read_options(fields, session.options, mode)
    stream = fields.flag("stream")
    include_usage = read_include_usage(fields)
    events = fields.flag("events")
    if not stream:
        for name in _STREAM_ONLY:
            fields.ignore(name)
    return AnswerFields(
        model=names.id_of(role),
        role=role,
        options=options,
        budget=budget,
        threshold=threshold,
        local_only=local_only,
        exact=fields.flag("exact"),
        stream=stream,
        include_usage=stream and include_usage,
        events=events and stream,
    )


def read_include_usage(fields: Fields) -> bool:
    """Return `include_usage` of `stream_options`. Raises ApiError."""
    options = fields.take("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", "stream_options must be an object")
    name = "stream_options.include_usage"
    return Fields({name: options.get("include_usage")}).flag(name)


def refuse_decoding(fields: Fields, sampling: Sampling) -> None:
    """Refuse fields that would change how the small model decodes. Raises ApiError.

    Greedy decoding is the same with and without the filters of other servers.
    """
    _refuse(fields, _UNSUPPORTED_DECODING)
    for name, neutral in _FILTERS.items():
        if sampling.is_greedy:
            fields.take(name)
        else:
            fields.refuse(name, neutral=neutral, reason="use temperature, top_p, top_k and min_p")


def with_ignored(answer: AnswerFields, fields: Fields) -> AnswerFields:
    """Return the fields with the names of those that nothing has read."""
    return replace(answer, ignored=tuple(fields.ignored))


def _read_options(fields: Fields, defaults: Options, mode: str | None) -> Options:
    limit = read_limit(fields, "max_completion_tokens", low=1)
    former_limit = read_limit(fields, "max_tokens", low=0)
    max_tokens = limit or former_limit
    return replace(
        defaults,
        max_tokens=defaults.max_tokens if max_tokens is None else max(1, max_tokens),
        stop=fields.texts("stop", limit=_MAX_STOPS) or defaults.stop,
        sampling=_read_sampling(fields, defaults.sampling),
        mode=defaults.mode if mode is None else Mode(mode),
    )


def _read_sampling(fields: Fields, defaults: Sampling) -> Sampling:
    temperature = _read_number(fields, "temperature", high=100)
    top_p = _read_number(fields, "top_p", high=1)
    if top_p == 0:
        # A nucleus of nothing still holds the likeliest token, as on other servers.
        temperature, top_p = 0.0, None
    # vLLM's number for no limit is -1, llama.cpp's is 0.
    top_k = fields.integer("top_k", low=-1, high=MAX_TOKENS)
    min_p = _read_number(fields, "min_p", high=1)
    return Sampling(
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        top_k=defaults.top_k if top_k is None else max(0, top_k),
        min_p=defaults.min_p if min_p is None else min_p,
        seed=_read_seed(fields, defaults.seed),
    )


def _read_number(fields: Fields, name: str, *, high: float) -> float | None:
    number = fields.number(name)
    if number is not None and not 0 <= number <= high:
        raise wrong(name, f"{name} must be from 0 to {high}")
    return number


def read_limit(fields: Fields, name: str, *, low: int) -> int | None:
    """Return a maximum number of tokens, at least `low`; None for none. Raises ApiError."""
    if fields.take(name) == NO_LIMIT:
        return None
    return fields.integer(name, low=low, high=MAX_TOKENS)


def _read_seed(fields: Fields, default: int | None) -> int | None:
    seed = fields.integer("seed", low=-(2**63), high=2**64 - 1)
    if seed is None:
        return default
    return None if seed == _RANDOM_SEED else seed % 2**64


def _refuse(fields: Fields, unsupported: dict[str, dict[str, tuple[Any, ...]]]) -> None:
    for reason, names in unsupported.items():
        for name, neutral in names.items():
            fields.refuse(name, neutral=neutral, reason=reason)
