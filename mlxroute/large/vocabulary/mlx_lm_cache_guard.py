"""A guard against prompts that equal a sequence in the prompt cache of `mlx_lm.server`.

The server caches the prompt and the generated tokens of each finished request. A later prompt that
equals such a sequence leaves it nothing to compute, and its generation thread dies. Such a prompt
is therefore sent without its last tokens, which the greedy reply then generates again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlxroute.tokenizers.utf8 import decode_or_none
from mlxroute.types import LargeContext

# The server's default is 10 sequences; its user can set more.
_MAX_FINISHED = 512
_MAX_UNREAD = 16
# Maximum number of small ids assumed for one token of another large vocabulary.
_MAX_SPELLED = 8


@dataclass(frozen=True, slots=True)
class Usage:
    """The server's counts: the tokens of a prompt, and how many of them were cached."""

    prompt: int
    cached: int


@dataclass(frozen=True, slots=True)
class _FinishedRequest:
    """The `tokens` that a request generated.

    `size` is the length of prompt and tokens in bytes, `total` in tokens, None if unknown.
    """

    tokens: tuple[bytes, ...]
    size: int
    total: int | None


class MlxLmCacheGuard:
    """Remembers the requests sent and shortens prompts that would crash the server."""

    def __init__(self) -> None:
        self._finished: OrderedDict[bytes, _FinishedRequest] = OrderedDict()
        # Prompt -> `max_tokens` of each of its requests whose reply was not read.
        self._unread: OrderedDict[str, list[int]] = OrderedDict()
        # Prompt of unread requests -> what the server generates first, from the reply to another.
        self._begun: dict[str, bytes] = {}

    def plan(self, prompt: str, *, context: LargeContext | None) -> tuple[str, tuple[bytes, ...]]:
        """Return the text to send for `prompt`, and the tokens that the reply must repeat first.

        `context` has the tokens at the end of the prompt; None if they are unknown.
        """
        repeated: tuple[bytes, ...] = ()
        while True:
            shorter = self._without_generated(prompt)
            if shorter is None and context is not None:
                shorter = self._cut_to_unread(prompt, repeated, context)
            if shorter is None:
                return prompt, repeated
            prompt, tail = shorter
            repeated = (*tail, *repeated)

    def record_request(self, prompt: str, *, max_tokens: int) -> None:
        """Record a request; until its reply is read, the sequence it caches is unknown."""
        self._unread[prompt] = [*self._unread.pop(prompt, ()), max_tokens]
        if len(self._unread) > _MAX_UNREAD:
            self._begun.pop(self._unread.popitem(last=False)[0], None)

    def record_refusal(self, prompt: str, *, max_tokens: int) -> None:
        """Record that the server generated nothing for a request."""
        limits = self._unread.get(prompt, [])
        if max_tokens in limits:
            limits.remove(max_tokens)
        if not limits:
            self._unread.pop(prompt, None)
            self._begun.pop(prompt, None)

    def record_reply(
        self, prompt: str, tokens: Sequence[bytes | None], *, usage: Usage | None = None
    ) -> None:
        """Record the tokens that a request generated; ignore them if one has unknown bytes."""
        known = tuple(token for token in tokens if token)
        if len(known) < len(tokens):
            return
        if usage is not None and 0 < usage.cached == usage.prompt - 1:
            self._forget_covered(prompt, known, usage.prompt)
        # Earlier requests whose replies were lost generated the same tokens, up to their limits.
        # The reply to another request with this prompt may have been read first.
        limits = self._unread.pop(prompt, [len(known)])
        for count in {min(count, len(known)) for count in limits}:
            self._remember(prompt, known[:count], usage)
        longer = [count for count in limits if count > len(known)]
        self._begun.pop(prompt, None)
        if longer and len(known) in limits:
            self._unread[prompt] = longer
            self._begun[prompt] = b"".join(known)

    def _forget_covered(self, prompt: str, tokens: tuple[bytes, ...], prompt_tokens: int) -> None:
        """Forget cached beginnings of this sequence, which the server has just dropped itself.

        The server drops them if its caches can be trimmed. That is certain if it took all but one
        token of a prompt from a longer sequence. Equal token counts show equal tokens.
        """
        if self._may_be_cached_prefix(prompt, prompt_tokens - 1):
            return
        for kept in range(1, len(tokens)):
            key = _key(prompt.encode() + b"".join(tokens[:kept]))
            old = self._finished.get(key)
            if old is not None and old.total == prompt_tokens + kept:
                del self._finished[key]

    def _may_be_cached_prefix(self, prompt: str, tokens: int) -> bool:
        """Return whether a cached sequence may be exactly the first `tokens` of this prompt."""
        data = prompt.encode()
        return any(
            finished.total == tokens and _key(data[: finished.size]) == key
            for key, finished in self._finished.items()
        ) or any(prompt.startswith(start) and prompt != start for start in self._unread)

    def _remember(self, prompt: str, tokens: tuple[bytes, ...], usage: Usage | None) -> None:
        sequence = prompt.encode() + b"".join(tokens)
        key = _key(sequence)
        total = None if usage is None else usage.prompt + len(tokens)
        self._finished[key] = _FinishedRequest(tokens, len(sequence), total)
        self._finished.move_to_end(key)
        if len(self._finished) > _MAX_FINISHED:
            self._finished.popitem(last=False)

    def _without_generated(self, prompt: str) -> tuple[str, tuple[bytes, ...]] | None:
        """Cut the last generated tokens off a prompt that equals a cached sequence."""
        finished = self._finished.get(_key(prompt.encode()))
        return None if finished is None else next(_cuts(prompt, finished.tokens), None)

    def _cut_to_unread(
        self, prompt: str, repeated: tuple[bytes, ...], context: LargeContext
    ) -> tuple[str, tuple[bytes, ...]] | None:
        """Cut a prompt to that of an unread request whose cached sequence it may equal."""
        end = len(context.token_ids) - len(context.fragment_ids)
        for start, limits in reversed(self._unread.items()):
            if prompt.startswith(start) and prompt != start:
                reach = len(repeated) + max(limits) * _MAX_SPELLED
                ids = context.token_ids[max(0, end - reach) : end]
                tokens = [context.vocabulary.token_bytes(token_id) for token_id in ids]
                tail = _slice(tokens, prompt[len(start) :].encode(), rest=b"".join(repeated))
                if tail and self._may_generate(start, b"".join((*tail, *repeated))):
                    return start, tail
        return None

    def _may_generate(self, prompt: str, data: bytes) -> bool:
        """Return whether the server may generate this data, as far as its tokens are known."""
        begun = self._begun.get(prompt, b"")
        return data.startswith(begun) or begun.startswith(data)


def _cuts(prompt: str, tokens: tuple[bytes, ...]) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Yield the prompt without its last 1, 2, ... tokens, if it then ends on a whole character."""
    data = prompt.encode()
    for kept in range(len(tokens) - 1, -1, -1):
        tail = tokens[kept:]
        text = decode_or_none(data[: len(data) - len(b"".join(tail))])
        if text is not None:
            yield text, tail


def _slice(tokens: Sequence[bytes], data: bytes, *, rest: bytes) -> tuple[bytes, ...]:
    """Return the tokens that spell `data` if the ones after them spell `rest`; else none."""
    sizes = [len(b"".join(tokens[start:])) for start in range(len(tokens) + 1)]
    size = len(data) + len(rest)
    if size not in sizes or len(rest) not in sizes:
        return ()
    spelling = tuple(tokens[sizes.index(size) : sizes.index(len(rest))])
    return spelling if b"".join(spelling) == data else ()


def _key(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
