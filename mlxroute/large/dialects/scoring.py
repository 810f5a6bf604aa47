"""Requests for the logprobs of a text that the large model did not write itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from mlxroute.errors import LargeProtocolError
from mlxroute.large.dialects.base import Dialect, RequestOptions, add_model
from mlxroute.large.dialects.completions import PlainCompletions, named_token
from mlxroute.large.dialects.json_fields import (
    as_array,
    as_logprob,
    as_object,
    as_text,
    first_choice,
    usage_counts,
)
from mlxroute.large.dialects.llama_server import LlamaServer
from mlxroute.large.dialects.vllm import VllmCompletions
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken

# Makes the sampler take a token, whatever its logit.
_FORCING_BIAS: Final = 1e6
# Probabilities below this one are 0 in float32, and some servers then send its lowest number.
_LOWEST_LOGPROB: Final = -1e4


class ScoringMethod(ABC):
    """How servers of one family give the logprob of each token of a given text.

    The text is what `whole`, a prompt with the text as its answer, has after `prompt`.
    """

    path: str
    at_root: bool = False

    @abstractmethod
    def requests(
        self, prompt: Prompt, whole: Prompt, model: str | None
    ) -> Iterator[dict[str, object]]:
        """Yield the bodies that ask for all logprobs, in the order of the text."""

    @abstractmethod
    def read(
        self, reply: Mapping[str, object], number: int, prompt: Prompt, whole: Prompt
    ) -> Completion:
        """Read the reply to body `number`, from 0; its positions are tokens of the text.

        Raises LargeProtocolError for a reply without logprobs of just these tokens.
        """


class EchoedText(ScoringMethod):
    """`echo` of `/v1/completions`: one request returns prompt and text with logprobs."""

    path = "/completions"

    def __init__(self, *, by_id: bool) -> None:
        self._by_id = by_id

    def requests(
        self, prompt: Prompt, whole: Prompt, model: str | None
    ) -> Iterator[dict[str, object]]:
        """Yield one body. It asks for a new token too, because servers refuse to write none."""
        body: dict[str, object] = {
            "prompt": list(whole.ids) if self._by_id else whole.text,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "echo": True,
        }
        if self._by_id:
            body["return_tokens_as_token_ids"] = True
        yield add_model(body, RequestOptions(1, 1, model))

    def read(
        self, reply: Mapping[str, object], number: int, prompt: Prompt, whole: Prompt
    ) -> Completion:
        """Read the echoed tokens, named by id or by text."""
        logprobs = as_object(first_choice(reply).get("logprobs"), what="logprobs")
        names = [
            as_text(name, what="a token's text")
            for name in as_array(logprobs.get("tokens"), what="logprobs.tokens")
        ]
        values = as_array(logprobs.get("token_logprobs"), what="token_logprobs")
        if len(values) != len(names):
            raise LargeProtocolError("the reply's tokens and its logprobs differ in number")
        if self._by_id:
            begin, end = _range_of_ids(names, prompt.ids, whole.ids)
        else:
            named = [named_token(name).named_bytes for name in names]
            begin, end = _range_of_text(named, prompt.text.encode(), whole.text.encode())
        positions = [
            ReplyPosition(ReplyToken(text=name, logprob=_text_logprob(value)))
            for name, value in zip(names[begin:end], values[begin:end], strict=True)
        ]
        return Completion(tuple(positions), **usage_counts(reply))


class ForcedTokens(ScoringMethod):
    """llama-server's `/completion`: one request a token, whose choice a bias forces.

    The server reports logprobs from before its samplers, so the bias does not change them.
    """

    path = LlamaServer.path
    at_root = LlamaServer.at_root

    def __init__(self) -> None:
        self._dialect = LlamaServer()

    def requests(
        self, prompt: Prompt, whole: Prompt, model: str | None
    ) -> Iterator[dict[str, object]]:
        """Yield a body for each token of the text."""
        options = RequestOptions(max_tokens=1, top_logprobs=1, model=model)
        for end in range(len(prompt.ids), len(whole.ids)):
            body = self._dialect.request(Prompt(ids=whole.ids[:end]), options)
            yield body | {"logit_bias": [[whole.ids[end], _FORCING_BIAS]]}

    def read(
        self, reply: Mapping[str, object], number: int, prompt: Prompt, whole: Prompt
    ) -> Completion:
        """Read the forced token."""
        completion = self._dialect.completion(reply, prompt)
        token = completion.positions[0].token
        if token.token_id != whole.ids[len(prompt.ids) + number]:
            raise LargeProtocolError("the server did not take the token that it was told to")
        if token.logprob is None:
            raise LargeProtocolError(
                "the server gives no logprob of a token that ends inside a character"
            )
        _text_logprob(token.logprob)
        return replace(completion, positions=completion.positions[:1])


def find_scoring_method(dialect: Dialect) -> ScoringMethod | None:
    """Return how a server with this dialect scores a text; None if it has no way."""
    match dialect:
        case LlamaServer():
            return ForcedTokens()
        case VllmCompletions():
            return EchoedText(by_id=True)
        case PlainCompletions() if dialect.names_tokens:
            return EchoedText(by_id=False)
        case _:
            return None


def _range_of_ids(
    names: Sequence[str], prompt_ids: Sequence[int], whole_ids: Sequence[int]
) -> tuple[int, int]:
    """Return the range of the text's tokens among names of the form `token_id:5`."""
    if list(names[: len(whole_ids)]) != [f"token_id:{token_id}" for token_id in whole_ids]:
        raise LargeProtocolError("the server did not echo the text")
    return len(prompt_ids), len(whole_ids)


def _range_of_text(names: Sequence[bytes], prompt: bytes, whole: bytes) -> tuple[int, int]:
    """Return the range of the text's tokens; a begin token may come before the prompt."""
    start = b"".join(names).find(whole)
    if start < 0:
        raise LargeProtocolError("the server did not echo the text")
    offsets = [0]
    for name in names:
        offsets.append(offsets[-1] + len(name))
    try:
        # A token without characters at the start belongs to the prompt.
        begin = len(offsets) - 1 - offsets[::-1].index(start + len(prompt))
        return begin, offsets.index(start + len(whole))
    except ValueError as exc:
        raise LargeProtocolError("a token of the server reaches beyond the text") from exc


def _text_logprob(value: object) -> float:
    """Return the logprob of a token of the text."""
    number = as_logprob(value)
    if number < _LOWEST_LOGPROB:
        raise LargeProtocolError("the text has a token whose probability the server rounds to 0")
    return number
