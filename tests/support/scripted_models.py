"""Scripted models and a clock that a test sets, for exact schedules of calls.

The vocabulary has one id per byte; 256 ends the answer, 257 ends one character and begins another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mlxroute.errors import LargeError
from mlxroute.types import (
    BranchCost,
    EncodedPrompt,
    LargeContext,
    LargeToken,
    Message,
    Progress,
    PromptText,
    Sampling,
    Signals,
    Uploads,
)

EOS = 256
STRADDLING = 257


class ByteVocabulary:
    """Ids 0 to 255 are bytes, 256 is the end token, 257 the two middle bytes of "éé"."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({EOS})

    @property
    def end_id(self) -> int:
        return EOS

    @property
    def bos_text(self) -> str:
        return ""

    @property
    def size(self) -> int:
        return EOS + 1

    @property
    def control_names(self) -> frozenset[str]:
        return frozenset({"</s>"})

    @property
    def special_names(self) -> frozenset[str]:
        return self.control_names

    @property
    def template_ids(self) -> frozenset[int]:
        return self.eos_ids

    def piece(self, token_id: int) -> str | None:
        if token_id == EOS:
            return "</s>"
        return f"<0x{token_id:02X}>" if 0 <= token_id < 256 else None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == STRADDLING:
            return "éé".encode()[1:3]
        return bytes([token_id]) if 0 <= token_id < 256 else b""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


class TwoEndVocabulary(ByteVocabulary):
    """In it the byte 0 ends an answer too."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({0, EOS})


def signals(token_id: int, entropy_nats: float = 0.0) -> Signals:
    """Return signals of which only the token and the entropy matter."""
    return Signals(token_id, -0.1, entropy_nats, 0.0, 0.9, (token_id,), (-0.1,))


class ScriptedSmall:
    """Proposes `script[i]` as token i of every answer, with an entropy of `entropies[i]` nats."""

    name = "tiny"
    fingerprint = ""
    head_sha256 = None

    def __init__(
        self,
        script: Sequence[int],
        *,
        entropies: dict[int, float] | None = None,
        context: int = 4096,
        vocabulary: ByteVocabulary | None = None,
    ) -> None:
        self._vocabulary = vocabulary or ByteVocabulary()
        self._script = [*script, EOS]
        self._entropies = entropies or {}
        self._context = context
        self._position = 0
        self._prompt_ids: list[int] = []
        self.fed: list[int] = []

    @property
    def cached_ids(self) -> Sequence[int]:
        return [*self._prompt_ids, *self.fed]

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        return ()

    @property
    def vocabulary(self) -> ByteVocabulary:
        return self._vocabulary

    @property
    def context_length(self) -> int:
        return self._context

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        text = "".join(f"[{message['role']}]{message['content']}" for message in messages) + ">"
        return EncodedPrompt(tuple(text.encode()), PromptText(text, text))

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        progress("prompt", len(prompt_ids), len(prompt_ids))
        self._position = 0
        self._prompt_ids = list(prompt_ids)
        self.fed = []
        return self._signals(), 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        self.fed.extend(token_ids)
        self._position += len(token_ids)
        return self._signals()

    def can_rollback(self, count: int) -> bool:
        return True

    @property
    def max_rows(self) -> int:
        return 1

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        raise AssertionError("there is one row only")

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        raise AssertionError("there is one row only")

    def select(self, row: int) -> None:
        assert row == 0

    def rollback(self, count: int) -> None:
        del self.fed[len(self.fed) - count :]
        self._position -= count

    def _signals(self) -> Signals:
        at = min(self._position, len(self._script) - 1)
        return signals(self._script[at], self._entropies.get(self._position, 0.0))


ScriptedReply = bytes | LargeError | tuple[int, ...] | LargeToken


class ScriptedLarge:
    """Answers call i with `replies[i]`, then repeats the last: bytes, ids, a token, or an error.

    Each call takes `seconds` on the fake clock, `lost_s` of them in failed attempts.
    """

    model_name = full_model_name = "scripted"
    base_url = "http://127.0.0.1:1/v1"
    neutralised: tuple[str, ...] = ()

    def __init__(
        self,
        replies: Sequence[ScriptedReply],
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
        self.prefetches: list[int] = []
        self._calls: list[FakeCall] = []
        self.contexts: list[LargeContext] = []
        self.deadlines: list[float] = []
        self.whole_limits: list[float] = []
        self.longest_call_s = 0.0
        self.is_approximate = False
        self.whole_answer = ScriptedWholeAnswer("")
        self.scores = ScriptedScores()

    def extend_timeout(self, timeout_s: float) -> None:
        self.longest_call_s = timeout_s

    def whole_chat(self, *, timeout_s: float) -> ScriptedWholeAnswer:
        self.whole_limits.append(timeout_s)
        return self.whole_answer

    def scorer(self, *, timeout_s: float) -> ScriptedScores:
        self.whole_limits.append(timeout_s)
        return self.scores

    @property
    def is_local(self) -> bool:
        return False

    @property
    def max_in_flight(self) -> int:
        return 8

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> FakeCall:
        reply = self._replies[min(len(self.contexts), len(self._replies) - 1)]
        self.contexts.append(context)
        self.prefetches.append(prefetch)
        self.deadlines.append(deadline_s)
        self.uploads += Uploads(requests=1, size_bytes=100)
        ready_s = 0.0
        if self._clock is not None:
            ready_s = self._clock.now + min(self._seconds, deadline_s)
        call = FakeCall(self._tokens(reply), ready_s=ready_s, clock=self._clock)
        self._calls.append(call)
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        if self._clock is not None and not ready():
            ready_times_s = [call.ready_s for call in self._calls if not call.ready]
            self._clock.now = min([*ready_times_s, self._clock.now + timeout_s])

    def _tokens(self, reply: ScriptedReply) -> LargeToken | LargeError:
        if isinstance(reply, LargeError | LargeToken):
            return reply
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


@dataclass
class ScriptedScores:
    """A scorer that gives every token of an answer one logprob, and an error for some texts.

    `texts` are those that it was asked for.
    """

    logprob: float = -0.5
    error: LargeError | None = None
    failing: Callable[[str], bool] = lambda text: True
    texts: list[str] = field(default_factory=list)

    def score(self, prompt: LargeContext, answered: LargeContext) -> Iterator[float]:
        text = answered.text.removeprefix(prompt.text)
        self.texts.append(text)
        if self.error is not None and self.failing(text):
            raise self.error
        yield from [self.logprob] * (len(answered.token_ids) - len(prompt.token_ids))


@dataclass
class ScriptedWholeAnswer:
    """A whole answer, and the chat that returns it; `conversations` are those it was asked for."""

    text: str
    ends: bool = True
    prompt_tokens: int | None = 10
    completion_tokens: int | None = None
    conversations: list[Sequence[Message]] = field(default_factory=list)
    is_cancelled: bool = False

    def answer(self, messages: Sequence[Message], *, max_tokens: int) -> ScriptedWholeAnswer:
        self.conversations.append(messages)
        return self

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeCall:
    """A call that is ready at `ready_s` on its clock, and at once without a clock."""

    def __init__(
        self, outcome: LargeToken | LargeError, *, ready_s: float, clock: FakeClock | None
    ) -> None:
        self._outcome = outcome
        self._clock = clock
        self.ready_s = ready_s
        self.cancelled = False

    @property
    def ready(self) -> bool:
        return self._clock is None or self._clock.now >= self.ready_s

    @property
    def finished(self) -> bool:
        return self.ready

    def result(self) -> tuple[LargeToken, ...]:
        assert self.ready
        if isinstance(self._outcome, LargeError):
            raise self._outcome
        return (self._outcome,)

    def cancel(self) -> None:
        self.cancelled = True


class FakeClock:
    """A clock that shows the time in `now`, in seconds, until a test changes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
