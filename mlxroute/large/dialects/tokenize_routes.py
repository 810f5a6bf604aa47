"""The tokenise, detokenise and template routes of llama-server, vLLM and SGLang."""

from __future__ import annotations

import copy
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol, Self, TypeVar

from mlxroute.errors import LargeProtocolError, LargeRefused, LargeUnreadable
from mlxroute.large.dialects.base import NO_THINKING
from mlxroute.large.dialects.json_fields import as_array, as_text, as_token_id
from mlxroute.large.prompt import check_last_turn
from mlxroute.messages import ANSWER_OPENINGS, fold_system
from mlxroute.tokenizers.control_tokens import ControlTokens
from mlxroute.types import Message, PromptText

_T = TypeVar("_T")
_SAMPLE: Final = "Hello world"
_SAMPLE_TURNS: Final[tuple[Message, ...]] = ({"role": "user", "content": _SAMPLE},)
# Characters and ids in the cache: some 40 MB of memory.
_MAX_CACHED: Final = 1 << 20
_ANCHOR: Final = "\n"
_ANY_CONTROLS: Final = ControlTokens((), any_form=True)
# Names of control tokens hold one of these, in every vocabulary we know.
_MAY_BE_CONTROL: Final = re.compile(r"[<>\[\]|｜]")
TEMPLATE_STATUSES: Final = frozenset({400, 422, 500})
"""Statuses with which servers answer if their chat template refuses a conversation."""
# Older servers have no route for conversations, and some models have no template.
_NO_MESSAGES_STATUSES: Final = {400, 404, 405, 422}
# Statuses of routes that fail, or that do not exist.
_UNCLEAR_STATUSES: Final = {200, 500}


class Post(Protocol):
    """A function that posts JSON to a route at the server's root and returns the reply's object.

    Raises LargeError for any status but 200.
    """

    def __call__(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]: ...


class _IdCache:
    """Token ids by text; the least recently used go once it has too many characters and ids."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()
        self._size = 0

    def get(self, key: tuple[str, str], compute: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """Return the ids of a text and its kind, computed if they are not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        ids = self._entries[key] = compute()
        self._size += len(key[1]) + len(ids)
        # The latest is kept whatever its size, because every position of an answer needs it.
        while self._size > _MAX_CACHED and len(self._entries) > 1:
            (_, text), dropped = self._entries.popitem(last=False)
            self._size -= len(text) + len(dropped)
        return ids


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
        self._cache = _IdCache()
        self._anchor_ids: tuple[int, ...] = ()

    def with_post(self, post: Post) -> Self:
        """Return the same routes, with the same cache, that send their requests with `post`."""
        routes = copy.copy(self)
        routes._post = post
        return routes

    def prompt_ids(self, messages: Sequence[Message], *, thinks: bool = False) -> tuple[int, ...]:
        """Return the ids of a conversation in the server's chat template.

        Thinking that the template begins is ended, unless the answer `thinks`.
        """

        def encode() -> tuple[int, ...]:
            ids = self._encode_accepted(messages)
            return ids if thinks else self._end_thinking(ids)

        kind = "thinking prompt" if thinks else "prompt"
        return self._cache.get((kind, json.dumps(list(messages))), encode)

    def takes_messages(self) -> bool:
        """Return whether the server encodes conversations, as a request for one shows."""
        try:
            self.prompt_ids(_SAMPLE_TURNS)
        except LargeRefused as exc:
            if exc.status in _NO_MESSAGES_STATUSES:
                return False
            raise
        return True

    def prompt_text(
        self, messages: Sequence[Message], *, thinks: bool = False
    ) -> PromptText | None:
        """Return None: the routes give ids only."""
        return None

    def rendered_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a whole prompt; names of control tokens in it become control tokens."""
        key = ("rendered", text)
        return self._cache.get(key, lambda: self._encode_markers(text, is_first=True))

    def _encode_accepted(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode the messages; without a system role if the server's template refuses it."""
        try:
            return self._encode_messages(messages)
        except LargeRefused as exc:
            folded = fold_system(messages)
            if exc.status not in TEMPLATE_STATUSES or folded == list(messages):
                raise
            return self._encode_messages(folded)

    def _end_thinking(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a prompt, with the end of thinking that its template begins.

        The ids at the prompt's end are compared with those of the ends in `ANSWER_OPENINGS`. The
        ids of the end and its opening, encoded as one text, take their place.
        """
        for end, opening in ANSWER_OPENINGS.items():
            end_ids = self._end_ids(end)
            if end_ids and ids[-len(end_ids) :] == end_ids:
                return ids[: -len(end_ids)] + self._end_ids(end + opening)
        return ids

    def _end_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text at a prompt's end, control tokens included."""
        key = ("end", text)
        return self._cache.get(key, lambda: self._encode_markers(text, is_first=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a piece of plain text."""
        return self._cache.get(("text", text), lambda: self._encode_plain(text))

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        """Encode a text in parts, so that no part holds the name of a control token."""
        cuts = [0, *(start + 1 for start, _ in _ANY_CONTROLS.find(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)] if text else [""]
        return tuple(i for part in parts for i in self._encode_without_prefix(part))

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""

    def convert_sample(self) -> bool:
        """Return whether a sample text is converted rightly; also detect the prefix of texts."""
        ids = self.encode(_SAMPLE)
        if not ids or self.decode(ids).strip() != _SAMPLE:
            return False
        self._detect_prefix()
        return True

    def _detect_prefix(self) -> None:
        """Detect whether the server adds a space before every text, as SentencePiece does."""
        anchor = self._encode(_ANCHOR)
        rest = _ids_after(anchor, self._encode(_ANCHOR + _SAMPLE))
        if rest != self._encode(_SAMPLE):
            self._anchor_ids = anchor if rest else ()

    def _call(
        self, path: str, body: Mapping[str, object], read: Callable[[Mapping[str, object]], _T]
    ) -> _T:
        """Post to a route, with the model's name if that is known; return what `read` reads.

        A request whose reply cannot be read is sent once more.
        """
        named = body if self._model is None else {**body, "model": self._model}
        try:
            return read(self._post(path, named))
        except LargeProtocolError:
            return read(self._post(path, named))

    def _encode_without_prefix(self, text: str) -> tuple[int, ...]:
        if not self._anchor_ids or not text:
            return self._encode(text)
        return _ids_after(self._anchor_ids, self._encode(_ANCHOR + text)) or self._encode(text)

    @abstractmethod
    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]: ...

    @abstractmethod
    def _encode_markers(self, text: str, *, is_first: bool) -> tuple[int, ...]:
        """Return the ids of a template's text, control tokens included.

        A text that `is_first` gets the begin token that the server adds.
        """

    @abstractmethod
    def _encode(self, text: str) -> tuple[int, ...]: ...


class LlamaTokenizeRoutes(TokenizeRoutes):
    """`llama-server`: `/apply-template`, `/tokenize`, `/detokenize`."""

    reads_control_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        return self._call("/detokenize", {"tokens": list(ids)}, _text_under("content"))

    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        # The template route does not close a trailing turn.
        check_last_turn(messages)
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
        body = {"messages": list(messages), **NO_THINKING}
        return self._call("/apply-template", body, _text_under("prompt"))

    def _encode_markers(self, text: str, *, is_first: bool) -> tuple[int, ...]:
        body: dict[str, object] = {"add_special": is_first, "parse_special": True}
        if is_first or not self._anchor_ids:
            return self._tokenize({"content": text, **body})
        ids = self._tokenize({"content": _ANCHOR + text, **body})
        return _ids_after(self._anchor_ids, ids) or self._tokenize({"content": text, **body})

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._tokenize({"content": text, "add_special": False, "parse_special": False})

    def _tokenize(self, body: Mapping[str, object]) -> tuple[int, ...]:
        return self._call("/tokenize", body, _token_ids)


class VllmTokenizeRoutes(TokenizeRoutes):
    """vLLM and SGLang: `/tokenize`, for a text or messages, and `/detokenize`."""

    reads_control_tokens = True

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names."""
        # vLLM calls it prompt, SGLang text.
        return self._call("/detokenize", {"tokens": list(ids)}, _text_under("prompt", "text"))

    def _encode_messages(self, messages: Sequence[Message]) -> tuple[int, ...]:
        body = {"messages": list(messages), "add_generation_prompt": True, **NO_THINKING}
        return self._call("/tokenize", body, _token_ids)

    def _encode_markers(self, text: str, *, is_first: bool) -> tuple[int, ...]:
        if not is_first:
            return self._encode_without_prefix(text)
        return self._call("/tokenize", {"prompt": text, "add_special_tokens": True}, _token_ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._call("/tokenize", {"prompt": text, "add_special_tokens": False}, _token_ids)


def find_tokenize_routes(
    post: Post, *, model: str | None, former: object = None
) -> TokenizeRoutes | None:
    """Return the routes of a server, tried with a sample text; None if it has none.

    Routes of the kind of `former` worked before: a failure that may pass does not show that they
    are gone. Raises LargeError for it, and for a server that is too busy to answer.
    """
    for kind in (LlamaTokenizeRoutes, VllmTokenizeRoutes):
        routes = kind(post, model=model)
        try:
            if routes.convert_sample():
                return routes
        except LargeUnreadable:
            if isinstance(former, kind):
                raise
        except LargeProtocolError:
            continue
        except LargeRefused as exc:
            is_unclear = isinstance(former, kind) and exc.status in _UNCLEAR_STATUSES
            if exc.may_pass or is_unclear:
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


def _text_under(*keys: str) -> Callable[[Mapping[str, object]], str]:
    """Return a function that reads the text of a reply, under the first of these keys it has."""

    def read(reply: Mapping[str, object]) -> str:
        value = next((reply[key] for key in keys if key in reply), None)
        return as_text(value, what="text")

    return read


def _token_ids(reply: Mapping[str, object]) -> tuple[int, ...]:
    items = as_array(reply.get("tokens"), what="tokens")
    return tuple(as_token_id(item.get("id") if isinstance(item, dict) else item) for item in items)
