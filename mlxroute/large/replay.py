"""What a server has probably cached of our requests, so that no prompt equals it exactly.

`mlx_lm.server` keeps a finished request under its prompt and all generated tokens. A later prompt
equal to such a sequence leaves it nothing to compute, and its generation thread dies. So such a
prompt is sent without its last tokens, which the greedy reply then has to repeat first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from mlxroute.types import LargeContext

# The server's default is 10 sequences; a user can give it more.
_FINISHED = 512
_UNREAD = 16


class SentPrompts:
    """Remembers requests by their text and says what to send instead of a dangerous prompt."""

    def __init__(self) -> None:
        self._finished: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()
        # Prompt -> how many tokens each request asked for whose reply was not (yet) read.
        self._unread: OrderedDict[str, list[int]] = OrderedDict()

    def plan(self, prompt: str, *, context: LargeContext) -> tuple[str, tuple[bytes, ...]]:
        """The text to send for `prompt`, and the tokens that must come back before the wanted."""
        repeated: tuple[bytes, ...] = ()
        while True:
            shorter = self._shorter(prompt) or self._unread_start(prompt, repeated, context)
            if shorter is None:
                return prompt, repeated
            prompt, tail = shorter
            repeated = (*tail, *repeated)

    def sent(self, prompt: str, *, max_tokens: int) -> None:
        """A request is on its way; until its reply is read, its cached sequence is unknown."""
        self._unread[prompt] = [*self._unread.pop(prompt, ()), max_tokens]
        if len(self._unread) > _UNREAD:
            self._unread.popitem(last=False)

    def refused(self, prompt: str, *, max_tokens: int) -> None:
        """The server generated nothing for a request."""
        self._unread[prompt].remove(max_tokens)
        if not self._unread[prompt]:
            del self._unread[prompt]

    def answered(self, prompt: str, tokens: Sequence[bytes | None]) -> None:
        """A request generated these tokens; one whose bytes are unclear leaves it unread."""
        known = tuple(token for token in tokens if token is not None)
        if len(known) < len(tokens):
            return
        # Earlier requests whose replies were lost generated the same, as far as they went.
        asked = self._unread.pop(prompt)
        for count in {min(count, len(known)) for count in asked}:
            self._remember(prompt, known[:count])
        longer = [count for count in asked if count > len(known)]
        if longer and len(known) in asked:
            self._unread[prompt] = longer

    def _remember(self, prompt: str, tokens: tuple[bytes, ...]) -> None:
        key = _key(prompt.encode() + b"".join(tokens))
        self._finished[key] = tokens
        self._finished.move_to_end(key)
        if len(self._finished) > _FINISHED:
            self._finished.popitem(last=False)

    def _shorter(self, prompt: str) -> tuple[str, tuple[bytes, ...]] | None:
        tokens = self._finished.get(_key(prompt.encode()))
        return None if not tokens else next(_cuts(prompt, tokens), None)

    def _unread_start(
        self, prompt: str, repeated: tuple[bytes, ...], context: LargeContext
    ) -> tuple[str, tuple[bytes, ...]] | None:
        end = len(context.token_ids) - len(context.fragment_ids)
        for start, asked in reversed(self._unread.items()):
            if prompt.startswith(start) and prompt != start:
                reach = len(repeated) + max(asked)
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
