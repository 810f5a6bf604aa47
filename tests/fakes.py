"""Scripted models for exact schedules.

Vocabulary: one id per byte, 256 ends the answer, 257 ends one character and begins another.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxroute.errors import LargeError
from mlxroute.types import LargeContext, LargeToken, Message, Progress, Sampling, Signals, Uploads

EOS = 256
STRADDLING = 257


class ByteVocabulary:
    """Ids 0..255 are bytes, then the end token, then the two inner bytes of "éé"."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({EOS})

    @property
    def bos_text(self) -> str:
        return ""

    @property
    def size(self) -> int:
        return EOS + 1

    def piece(self, token_id: int) -> str | None:
        if token_id == EOS:
            return "</s>"
        return f"<0x{token_id:02X}>" if 0 <= token_id < 256 else None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == STRADDLING:
            return "éé".encode()[1:3]
        return bytes([token_id]) if token_id < 256 else b""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


def signals(token_id: int, entropy_nats: float = 0.0) -> Signals:
    """Signals with one interesting number."""
    return Signals(token_id, -0.1, entropy_nats, 0.0, 0.9, (token_id,), (-0.1,))


class ScriptedSmall:
    """Says `script[i]` as token i of every answer, with `entropies[i]` nats of doubt."""

    def __init__(
        self,
        script: Sequence[int],
        *,
        entropies: dict[int, float] | None = None,
        context: int = 4096,
    ) -> None:
        self._script = [*script, EOS]
        self._entropies = entropies or {}
        self._context = context
        self._position = 0
        self.fed: list[int] = []

    @property
    def vocabulary(self) -> ByteVocabulary:
        return ByteVocabulary()

    @property
    def context_length(self) -> int:
        return self._context

    def render(self, messages: Sequence[Message]) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + ">"

    def encode_prompt(self, text: str) -> list[int]:
        return list(text.encode())

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        progress("prompt", len(prompt_ids), len(prompt_ids))
        self._position = 0
        self.fed = []
        return self._signals(), 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        self.fed.extend(token_ids)
        self._position += len(token_ids)
        return self._signals()

    def _signals(self) -> Signals:
        at = min(self._position, len(self._script) - 1)
        return signals(self._script[at], self._entropies.get(self._position, 0.0))


Reply = bytes | LargeError | tuple[int, ...]


class ScriptedLarge:
    """Answers call i with `replies[i]` (the last one again): bytes, ids, or an error to raise.

    `seconds` pass on the fake clock at every call, `lost_s` of them in attempts that failed.
    """

    def __init__(
        self,
        replies: Sequence[Reply],
        *,
        clock: FakeClock | None = None,
        seconds: float = 0.0,
        lost_s: float = 0.0,
    ) -> None:
        self._replies = list(replies)
        self._clock = clock
        self._seconds = seconds
        self.uploads = Uploads()
        self._lost_s = lost_s
        self.contexts: list[LargeContext] = []
        self.deadlines: list[float] = []

    def next_token(self, context: LargeContext, *, deadline_s: float) -> LargeToken:
        reply = self._replies[min(len(self.contexts), len(self._replies) - 1)]
        self.contexts.append(context)
        self.deadlines.append(deadline_s)
        self.uploads += Uploads(requests=1, size_bytes=100)
        if self._clock is not None:
            self._clock.now += min(self._seconds, deadline_s)
        if isinstance(reply, LargeError):
            raise reply
        self.uploads += Uploads(tokens=10, cached_tokens=8, completion_tokens=1)
        ids = tuple(reply)
        return LargeToken(
            token_ids=ids,
            text=bytes(i for i in ids if i < 256).decode(errors="ignore"),
            is_eos=ids == (EOS,),
            logprob=-0.5,
            top=(),
            prompt_tokens=10,
            cached_tokens=8,
            completion_tokens=1,
            uploaded_bytes=100,
            latency_s=self._seconds,
            lost_s=self._lost_s,
        )


class FakeClock:
    """A clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
