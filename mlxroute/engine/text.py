"""From token bytes to text that may be shown: whole characters, nothing past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mlxroute.types import Span, Token

CharacterMark = tuple[tuple[bytes, int], tuple[int, ...]]


class CharacterStream:
    """Turns token bytes into complete characters; bytes that can never be text are dropped."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._fragment_ids: list[int] = []

    def push(self, token_id: int, token_bytes: bytes) -> str:
        """The characters this token completes; empty while one is still in the making."""
        text = self._decoder.decode(token_bytes)
        if self._decoder.getstate()[0]:
            self._fragment_ids.append(token_id)
        else:
            self._fragment_ids.clear()
        return text

    def mark(self) -> CharacterMark:
        """This state, to come back to."""
        return self._decoder.getstate(), tuple(self._fragment_ids)

    def restore(self, mark: CharacterMark) -> None:
        """Forget what was pushed since."""
        state, fragment_ids = mark
        self._decoder.setstate(state)
        self._fragment_ids = list(fragment_ids)

    @property
    def fragment_ids(self) -> tuple[int, ...]:
        """The ids since the last token that ended on a whole character."""
        return tuple(self._fragment_ids)


def spans(written: Iterable[tuple[str, tuple[int, ...] | None]]) -> tuple[Span, ...]:
    """The answer's text in stretches by who wrote it, as the large side needs it.

    Of each token its text and the large model's ids for it: empty where the small model wrote it,
    None for a further token of the same large token.
    """
    found: list[tuple[list[str], tuple[int, ...]]] = []
    named = False
    for text, ids in written:
        large_ids = ids if ids is not None or named else ()
        named = large_ids is None or bool(large_ids)
        if not text and not large_ids:
            continue
        if found and (large_ids is None or not (large_ids or found[-1][1])):
            found[-1][0].append(text)
        else:
            found.append(([text], large_ids or ()))
    return tuple(Span("".join(texts), ids) for texts, ids in found)


class StopStrings:
    """Holds tokens back while their text may still turn out to be part of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held: list[Token] = []
        self.hit = False

    def push(self, token: Token) -> Iterator[Token]:
        """Yield the tokens that may be shown now; after a hit the text ends before the match."""
        if not self._stop:
            yield token
            return
        self._held.append(token)
        text = "".join(held.text for held in self._held)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.hit = True
            yield from self._release(min(found), drop_rest=True)
        elif not (keep := self._partial_match(text)):
            yield from self._release(len(text), drop_rest=False)
        else:
            yield from self._release(len(text) - keep, drop_rest=False)

    def flush(self) -> Iterator[Token]:
        """Yield what is still held when the answer ends for another reason."""
        yield from self._held
        self._held = []

    def _partial_match(self, text: str) -> int:
        """Length of the longest tail of `text` that starts a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for size in range(min(len(text), longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, length: int, *, drop_rest: bool) -> Iterator[Token]:
        """Release whole tokens within the first `length` characters, or cut there for good."""
        while self._held:
            token = self._held[0]
            if len(token.text) > length:
                if not drop_rest:
                    return
                token = replace(token, text=token.text[:length])
            self._held.pop(0)
            length -= len(token.text)
            yield token
