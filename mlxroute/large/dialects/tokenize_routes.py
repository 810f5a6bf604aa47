"""The tokenise, detokenise and template routes of llama-server, vLLM and SGLang."""

from __future__ import annotations

import copy
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, Self

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large.dialects.base import NO_THINKING
from mlxroute.large.dialects.json_fields import as_array, as_text, as_token_id
from mlxroute.messages import fold_system
from mlxroute.tokenizers.control_tokens import ControlTokens
from mlxroute.types import Message, PromptText

_SAMPLE: Final = "Hello world"
_MAX_CACHED: Final = 4096
_ANCHOR: Final = "\n"
_ANY_CONTROLS: Final = ControlTokens((), any_form=True)
# Names of control tokens hold one of these, in every vocabulary we know.
_MAY_BE_CONTROL: Final = re.compile(r"[<>\[\]|｜]")
TEMPLATE_STATUSES: Final = frozenset({400, 422, 500})
"""Statuses with which servers answer if their chat template refuses a conversation."""
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
    vocabulary: Final = None
    reads_control_tokens: bool
    """Whether names of control tokens in texts become control tokens."""

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
        return self._cached(key, lambda: self._encode_accepted(messages))

    def prompt_text(self, messages: Sequence[Message]) -> PromptText | None:
        """Return None: the routes give ids only."""
        return None

    def _encode_accepted(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode the messages; without a system role if the server's template refuses it."""
        try:
            return self._encode_messages(messages)
        except LargeRefused as exc:
            folded = fold_system(messages)
            if exc.status not in TEMPLATE_STATUSES or folded == list(messages):
                raise
            return self._encode_messages(folded)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a piece of plain text."""
        return self._cached(("text", text), lambda: self._encode_plain(text))

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        """Encode a text in parts, so that no part holds the name of a control token."""
        cuts = [0, *(start + 1 for start, _ in _ANY_CONTROLS.find(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)] if text else [""]
        return tuple(i for part in parts for i in self._encode_without_prefix(part))

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

    reads_control_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        reply = self._call("/detokenize", {"tokens": list(ids)})
        return as_text(reply.get("content"), what="text")

    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        text = self._render(messages)
        system = [m["content"].strip() for m in messages if m["role"] == "system"]
        if not all(content in text for content in system):
            # Some templates leave out a system message without a word.
            messages = fold_system(messages)
            text = self._render(messages)
        if any(self._holds_control_tokens(message["content"]) for message in messages):
            return self._encode_apart(messages)
        return self._encode_markers(text, is_first=True)

    def _encode_apart(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode the template's text with its control tokens, and contents as plain text."""
        everything = "".join(message["content"] for message in messages)
        mark = next(c for c in map(chr, range(0xF0000, 0x110000)) if c not in everything)
        marked = [m | {"content": _between_marks(m["content"], mark)} for m in messages]
        parts = self._render(marked).split(mark)
        if len(parts) != 2 * sum(bool(m["content"].strip()) for m in messages) + 1:
            # The template changes contents, so that they cannot be told from its own text.
            plain = [m | {"content": _ANY_CONTROLS.neutralise(m["content"])[0]} for m in messages]
            return self._encode_markers(self._render(plain), is_first=True)
        ids: tuple[int, ...] = ()
        for number, part in enumerate(parts):
            if number % 2:
                ids += self.encode(part)
            elif part:
                ids += self._encode_markers(part, is_first=not number)
        return ids

    def _holds_control_tokens(self, content: str) -> bool:
        if not _MAY_BE_CONTROL.search(content):
            return False
        if next(_ANY_CONTROLS.find(content), None) is not None:
            return True
        parsed = self._tokenize({"content": content, "add_special": False, "parse_special": True})
        return parsed != self._encode(content)

    def _render(self, messages: Sequence[Message]) -> str:
        reply = self._call("/apply-template", {"messages": list(messages), **NO_THINKING})
        return as_text(reply.get("prompt"), what="the rendered prompt")

    def _encode_markers(self, text: str, *, is_first: bool) -> tuple[int, ...]:
        """Return the ids of the template's text, control tokens included."""
        body: dict[str, object] = {"add_special": is_first, "parse_special": True}
        if is_first or not self._anchor_ids:
            return self._tokenize({"content": text, **body})
        ids = self._tokenize({"content": _ANCHOR + text, **body})
        return _ids_after(self._anchor_ids, ids) or self._tokenize({"content": text, **body})

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._tokenize({"content": text, "add_special": False, "parse_special": False})

    def _tokenize(self, body: Mapping[str, object]) -> tuple[int, ...]:
        return _token_ids(self._call("/tokenize", body))


class VllmTokenizeRoutes(TokenizeRoutes):
    """vLLM and SGLang: `/tokenize`, for a text or messages, and `/detokenize`."""

    reads_control_tokens = True

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


def _between_marks(content: str, mark: str) -> str:
    """Return a content with a mark before and after it; the template may trim what is around."""
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    return f"{content[:start]}{mark}{core}{mark}{content[start + len(core) :]}"


def _ids_after(anchor: tuple[int, ...], ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids after `anchor`; empty if `ids` does not begin with it."""
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else ()


def _token_ids(reply: Mapping[str, object]) -> tuple[int, ...]:
    items = as_array(reply.get("tokens"), what="tokens")
    return tuple(as_token_id(item.get("id") if isinstance(item, dict) else item) for item in items)
