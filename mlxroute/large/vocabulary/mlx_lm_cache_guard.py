"""What a server has probably cached of our requests, so that no prompt equals it exactly.

`mlx_lm.server` keeps a finished request under its prompt and all generated tokens. A later prompt
equal to such a sequence leaves it nothing to compute, and its generation thread dies. So such a
prompt is sent without its last tokens, which the greedy reply then has to repeat first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlxroute.types import LargeContext

# The server's default is 10 sequences; a user can give it more.
_FINISHED = 512
_UNREAD = 16
# Ids of the small vocabulary that a token of another large one takes, at most, but for oddities.
_SPELLED = 8


@dataclass(frozen=True, slots=True)
class Usage:
    """The server's count of a prompt's tokens, and of those it had cached."""

    prompt: int
    cached: int


@dataclass(frozen=True, slots=True)
class _Finished:
    """The tokens a request generated, and the length of the whole sequence: bytes and tokens."""

    tokens: tuple[bytes, ...]
    size: int
    total: int | None


class MlxLmCacheGuard:
    """Remembers requests by their text and says what to send instead of a dangerous prompt."""

    def __init__(self) -> None:
        self._finished: OrderedDict[bytes, _Finished] = OrderedDict()
        # Prompt -> how many tokens each request asked for whose reply was not (yet) read.
        self._unread: OrderedDict[str, list[int]] = OrderedDict()

    def plan(self, prompt: str, *, context: LargeContext | None) -> tuple[str, tuple[bytes, ...]]:
        """The text to send for `prompt`, and the tokens that must come back before the wanted.

        `context` holds the tokens that the end of the prompt is made of, where they are known.
        """
        repeated: tuple[bytes, ...] = ()
        while True:
            shorter = self._shorter(prompt)
            if shorter is None and context is not None:
                shorter = self._unread_start(prompt, repeated, context)
            if shorter is None:
                return prompt, repeated
            prompt, tail = shorter
            repeated = (*tail, *repeated)

    def record_request(self, prompt: str, *, max_tokens: int) -> None:
        """A request is on its way; until its reply is read, its cached sequence is unknown."""
        self._unread[prompt] = [*self._unread.pop(prompt, ()), max_tokens]
        if len(self._unread) > _UNREAD:
            self._unread.popitem(last=False)

    def record_refusal(self, prompt: str, *, max_tokens: int) -> None:
        """The server generated nothing for a request."""
        self._unread[prompt].remove(max_tokens)
        if not self._unread[prompt]:
            del self._unread[prompt]

    def record_reply(
        self, prompt: str, tokens: Sequence[bytes | None], *, usage: Usage | None = None
    ) -> None:
        """A request generated these tokens; one whose bytes are unclear leaves it unread."""
        known = tuple(token for token in tokens if token)
        if len(known) < len(tokens):
            return
        if usage is not None and 0 < usage.cached == usage.prompt - 1:
            self._forget_covered(prompt, known, usage.prompt)
        # Earlier requests whose replies were lost generated the same, as far as they went.
        asked = self._unread.pop(prompt)
        for count in {min(count, len(known)) for count in asked}:
            self._remember(prompt, known[:count], usage)
        longer = [count for count in asked if count > len(known)]
        if longer and len(known) in asked:
            self._unread[prompt] = longer

    def _forget_covered(self, prompt: str, tokens: tuple[bytes, ...], prompt_tokens: int) -> None:
        """Drop sequences that the server has just dropped itself, being beginnings of this one.

        It does so where its caches can be trimmed, as the whole prompt but one token coming from a
        longer sequence shows; equal token counts show that both are cut into the same tokens.
        """
        if self._may_be_a_beginning(prompt, prompt_tokens - 1):
            return
        for kept in range(1, len(tokens)):
            key = _key(prompt.encode() + b"".join(tokens[:kept]))
            old = self._finished.get(key)
            if old is not None and old.total == prompt_tokens + kept:
                del self._finished[key]

    def _may_be_a_beginning(self, prompt: str, tokens: int) -> bool:
        """Whether a cached sequence may be just the first `tokens` tokens of this prompt."""
        data = prompt.encode()
        return any(
            finished.total == tokens and _key(data[: finished.size]) == key
            for key, finished in self._finished.items()
        ) or any(prompt.startswith(start) and prompt != start for start in self._unread)

    def _remember(self, prompt: str, tokens: tuple[bytes, ...], usage: Usage | None) -> None:
        whole = prompt.encode() + b"".join(tokens)
        key = _key(whole)
        total = None if usage is None else usage.prompt + len(tokens)
        self._finished[key] = _Finished(tokens, len(whole), total)
        self._finished.move_to_end(key)
        if len(self._finished) > _FINISHED:
            self._finished.popitem(last=False)

    def _shorter(self, prompt: str) -> tuple[str, tuple[bytes, ...]] | None:
        finished = self._finished.get(_key(prompt.encode()))
        return None if finished is None else next(_cuts(prompt, finished.tokens), None)

    def _unread_start(
        self, prompt: str, repeated: tuple[bytes, ...], context: LargeContext
    ) -> tuple[str, tuple[bytes, ...]] | None:
        end = len(context.token_ids) - len(context.fragment_ids)
        for start, asked in reversed(self._unread.items()):
            if prompt.startswith(start) and prompt != start:
                reach = len(repeated) + max(asked) * _SPELLED
                ids = context.token_ids[max(0, end - reach) : end]
                tokens = [context.vocabulary.token_bytes(token_id) for token_id in ids]
                tail = _slice(tokens, prompt[len(start) :].encode(), before=b"".join(repeated))
                if tail:
                    return start, tail
        return None


def _cuts(prompt: str, tokens: tuple[bytes, ...]) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """The prompt without its last one, two... tokens, where that ends with a whole character."""
    data = prompt.encode()
    for kept in range(len(tokens) - 1, -1, -1):
        tail = tokens[kept:]
        try:
            yield data[: len(data) - len(b"".join(tail))].decode("utf-8"), tail
        except UnicodeDecodeError:
            continue


def _slice(tokens: Sequence[bytes], data: bytes, *, before: bytes) -> tuple[bytes, ...]:
    """The tokens that spell `data`, `before` the bytes of the last ones; empty if none do."""
    sizes = [len(b"".join(tokens[start:])) for start in range(len(tokens) + 1)]
    whole = len(data) + len(before)
    if whole not in sizes or len(before) not in sizes:
        return ()
    found = tuple(tokens[sizes.index(whole) : sizes.index(len(before))])
    return found if b"".join(found) == data else ()


def _key(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
