"""The tokenise, detokenise and template routes of llama-server, vLLM and SGLang."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large.dialects.base import ANSWER_AT_ONCE
from mlxroute.large.dialects.json_fields import sequence, string, token_id
from mlxroute.types import Message

_SAMPLE: Final = "Hello world"
_REMEMBERED: Final = 4096
_ANCHOR: Final = "\n"
# Statuses that do not show whether the route exists.
_BUSY_STATUSES: Final = {408, 429, 502, 503, 504}


class Post(Protocol):
    """Posts a JSON body to a route at the server's root and returns the reply's JSON object.

    Raises LargeError for any status but 200.
    """

    def __call__(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]: ...


class TokenizeRoutes:
    """Ids from the server's own tokenise routes, each text asked for once."""

    name: Final = "the server's tokenise route"
    bos_text: Final = ""

    def __init__(self, post: Post, *, model: str | None) -> None:
        self._post = post
        self._model = model
        self._known: dict[tuple[str, str], tuple[int, ...]] = {}
        self._anchor_ids: tuple[int, ...] = ()

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        key = ("prompt", json.dumps(list(messages)))
        return self._remembered(key, lambda: self._prompt(messages))

    def prompt_text(self, messages: Sequence[Message]) -> str | None:
        return None

    def encode(self, text: str) -> tuple[int, ...]:
        return self._remembered(("text", text), lambda: self._without_prefix(text))

    def learn_prefix(self) -> None:
        """Find out whether the server begins every text with a space, as SentencePiece does."""
        anchor = self._encode(_ANCHOR)
        if (rest := _after(anchor, self._encode(_ANCHOR + _SAMPLE))) != self._encode(_SAMPLE):
            self._anchor_ids = anchor if rest else ()

    def _without_prefix(self, text: str) -> tuple[int, ...]:
        if not self._anchor_ids or not text:
            return self._encode(text)
        return _after(self._anchor_ids, self._encode(_ANCHOR + text)) or self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        raise LargeProtocolError("this server has no detokenise route")

    def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        raise LargeProtocolError("this server has no template route")

    def _encode(self, text: str) -> tuple[int, ...]:
        raise LargeProtocolError("this server has no tokenise route")

    def _remembered(
        self, key: tuple[str, str], ask: Callable[[], tuple[int, ...]]
    ) -> tuple[int, ...]:
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = ask()
        return self._known[key]


class LlamaTokenizeRoutes(TokenizeRoutes):
    """`llama-server`: `/apply-template`, `/tokenize`, `/detokenize`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        return string(self._post("/detokenize", {"tokens": list(ids)}).get("content"), what="text")

    def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        body = {"messages": list(messages), **ANSWER_AT_ONCE}
        reply = self._post("/apply-template", body)
        text = string(reply.get("prompt"), what="the rendered prompt")
        return self._tokens({"content": text, "add_special": True, "parse_special": True})

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._tokens({"content": text, "add_special": False, "parse_special": False})

    def _tokens(self, body: Mapping[str, object]) -> tuple[int, ...]:
        return _token_ids(self._post("/tokenize", body))


class VllmTokenizeRoutes(TokenizeRoutes):
    """vLLM and SGLang: `/tokenize` takes text or messages."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names."""
        reply = self._post("/detokenize", self._named({"tokens": list(ids)}))
        # vLLM calls it prompt, SGLang text.
        return string(reply.get("prompt", reply.get("text")), what="text")

    def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        body = {"messages": list(messages), "add_generation_prompt": True, **ANSWER_AT_ONCE}
        return _token_ids(self._post("/tokenize", self._named(body)))

    def _encode(self, text: str) -> tuple[int, ...]:
        body = {"prompt": text, "add_special_tokens": False}
        return _token_ids(self._post("/tokenize", self._named(body)))

    def _named(self, body: dict[str, object]) -> dict[str, object]:
        return body if self._model is None else body | {"model": self._model}


def find_tokenize_routes(post: Post, *, model: str | None) -> TokenizeRoutes | None:
    """Return the tokenise routes that decode a sample text correctly; None if there are none.

    Raises LargeError for a server that is too busy to answer.
    """
    for kind in (LlamaTokenizeRoutes, VllmTokenizeRoutes):
        routes = kind(post, model=model)
        try:
            ids = routes.encode(_SAMPLE)
            if ids and routes.decode(ids).strip() == _SAMPLE:
                routes.learn_prefix()
                return routes
        except LargeProtocolError:
            continue
        except LargeRefused as exc:
            if exc.status in _BUSY_STATUSES:
                raise
    return None


def _after(anchor: tuple[int, ...], ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that follow `anchor`; none where the two have merged."""
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else ()


def _token_ids(reply: Mapping[str, object]) -> tuple[int, ...]:
    items = sequence(reply.get("tokens"), what="tokens")
    return tuple(token_id(item.get("id") if isinstance(item, dict) else item) for item in items)
