"""The tokenise, detokenise and template routes of llama-server, vLLM and SGLang."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, Self

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large.dialects.base import NO_THINKING
from mlxroute.large.dialects.json_fields import as_array, as_text, as_token_id
from mlxroute.types import Message

_SAMPLE: Final = "Hello world"
_MAX_CACHED: Final = 4096
_ANCHOR: Final = "\n"
# Statuses that do not show whether the route exists.
_BUSY_STATUSES: Final = {408, 429, 502, 503, 504}


class Post(Protocol):
    """A function that posts JSON to a route at the server's root and returns the reply's object.

    Raises LargeError for any status but 200.
    """

    def __call__(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]: ...


class TokenizeRoutes(ABC):
    """The routes of a server that convert between text and token ids; ids are cached by text.

    Implements `vocabulary.token_sources.TokenSource`. Methods raise LargeError.
    """

    name: Final = "the server's tokenise route"
    bos_text: Final = ""

    def __init__(self, post: Post, *, model: str | None) -> None:
        self._post = post
        self._model = model
        self._cached_ids: dict[tuple[str, str], tuple[int, ...]] = {}
        self._anchor_ids: tuple[int, ...] = ()

    def with_post(self, post: Post) -> Self:
        """Return the same routes, with the same cache, that send their requests with `post`."""
        routes = copy.copy(self)
        routes._post = post
        return routes

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the ids of a conversation in the server's chat template."""
        key = ("prompt", json.dumps(list(messages)))
        return self._cached(key, lambda: self._encode_messages(messages))

    def prompt_text(self, messages: Sequence[Message]) -> str | None:
        """Return None: the routes give ids only."""
        return None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a piece of plain text."""
        return self._cached(("text", text), lambda: self._encode_without_prefix(text))

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""

    def detect_prefix(self) -> None:
        """Detect whether the server adds a space before every text, as SentencePiece does."""
        anchor = self._encode(_ANCHOR)
        rest = _ids_after(anchor, self._encode(_ANCHOR + _SAMPLE))
        if rest != self._encode(_SAMPLE):
            self._anchor_ids = anchor if rest else ()

    def _call(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        """Post to a route, with the name of the model if that is known."""
        return self._post(path, body if self._model is None else {**body, "model": self._model})

    def _encode_without_prefix(self, text: str) -> tuple[int, ...]:
        if not self._anchor_ids or not text:
            return self._encode(text)
        return _ids_after(self._anchor_ids, self._encode(_ANCHOR + text)) or self._encode(text)

    @abstractmethod
    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]: ...

    @abstractmethod
    def _encode(self, text: str) -> tuple[int, ...]: ...

    def _cached(
        self, key: tuple[str, str], compute: Callable[[], tuple[int, ...]]
    ) -> tuple[int, ...]:
        if key not in self._cached_ids:
            if len(self._cached_ids) >= _MAX_CACHED:
                self._cached_ids.clear()
            self._cached_ids[key] = compute()
        return self._cached_ids[key]


class LlamaTokenizeRoutes(TokenizeRoutes):
    """`llama-server`: `/apply-template`, `/tokenize`, `/detokenize`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        reply = self._call("/detokenize", {"tokens": list(ids)})
        return as_text(reply.get("content"), what="text")

    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        reply = self._call("/apply-template", {"messages": list(messages), **NO_THINKING})
        text = as_text(reply.get("prompt"), what="the rendered prompt")
        return self._tokenize({"content": text, "add_special": True, "parse_special": True})

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._tokenize({"content": text, "add_special": False, "parse_special": False})

    def _tokenize(self, body: Mapping[str, object]) -> tuple[int, ...]:
        return _token_ids(self._call("/tokenize", body))


class VllmTokenizeRoutes(TokenizeRoutes):
    """vLLM and SGLang: `/tokenize`, for a text or messages, and `/detokenize`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        reply = self._call("/detokenize", {"tokens": list(ids)})
        # vLLM calls it prompt, SGLang text.
        return as_text(reply.get("prompt", reply.get("text")), what="text")

    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        body = {"messages": list(messages), "add_generation_prompt": True, **NO_THINKING}
        return _token_ids(self._call("/tokenize", body))

    def _encode(self, text: str) -> tuple[int, ...]:
        body = {"prompt": text, "add_special_tokens": False}
        return _token_ids(self._call("/tokenize", body))


def find_tokenize_routes(post: Post, *, model: str | None) -> TokenizeRoutes | None:
    """Return the routes of a server, tried with a sample text; None if it has none.

    Raises LargeError for a server that is too busy to answer.
    """
    for kind in (LlamaTokenizeRoutes, VllmTokenizeRoutes):
        routes = kind(post, model=model)
        try:
            ids = routes.encode(_SAMPLE)
            if ids and routes.decode(ids).strip() == _SAMPLE:
                routes.detect_prefix()
                return routes
        except LargeProtocolError:
            continue
        except LargeRefused as exc:
            if exc.status in _BUSY_STATUSES:
                raise
    return None


def _ids_after(anchor: tuple[int, ...], ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids after `anchor`; empty if `ids` does not begin with it."""
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else ()


def _token_ids(reply: Mapping[str, object]) -> tuple[int, ...]:
    items = as_array(reply.get("tokens"), what="tokens")
    return tuple(as_token_id(item.get("id") if isinstance(item, dict) else item) for item in items)
