"""The large model's own answers, several at once, without a step of the small model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlxroute.engine import generate
from mlxroute.engine.options import MAX_PREFETCH
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.recorded.forward_only import ForwardOnlySmall
from mlxroute.recorded.replies import Replies
from mlxroute.routers import make_router
from mlxroute.small import SmallModel
from mlxroute.types import Message, Mode, Progress, Sampling, Signals, Vocabulary

_TIMEOUT_S = 600.0
# Signals that nobody looks at.
_NOTHING = Signals(
    token_id=-1,
    logprob=0.0,
    entropy_nats=math.inf,
    margin=0.0,
    varentropy=0.0,
    top_ids=(),
    top_logprobs=(),
    lse=0.0,
)


@dataclass(frozen=True, slots=True)
class LargeAnswer:
    """An answer in the small vocabulary, its end token included if it got there.

    `firsts` say which ids begin a token of the large model; `logprobs` are those of these tokens,
    NaN where the server gave none.
    """

    token_ids: tuple[int, ...]
    firsts: tuple[int, ...]
    logprobs: tuple[float, ...]


def write(
    small: SmallModel,
    replies: Replies,
    questions: Sequence[Question],
    *,
    examples: Sequence[Question],
    tokens: int,
    at_once: int,
    done: Callable[[], None],
) -> list[LargeAnswer]:
    """The large model's greedy answers to the questions, at most `at_once` being written at a time.

    Raises LargeError when it fails.
    """

    def answered(question: Question) -> LargeAnswer:
        written = _written(PlaceholderSmall(small), replies, question, examples, tokens)
        done()
        return written

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(answered, each) for each in questions]
        try:
            return [future.result() for future in futures]
        except BaseException:
            replies.close()
            pool.shutdown(cancel_futures=True)
            raise


def _written(
    small: PlaceholderSmall,
    replies: Replies,
    question: Question,
    examples: Sequence[Question],
    tokens: int,
) -> LargeAnswer:
    answer = generate(
        small,
        replies.seat(),
        question_messages(question, examples),
        router=make_router("entropy", threshold=-math.inf),
        max_tokens=tokens,
        timeout_s=_TIMEOUT_S,
        strict=True,
        mode=Mode.WAIT,
        prefetch=MAX_PREFETCH,
    )
    ids: list[int] = []
    firsts: list[int] = []
    logprobs: list[float] = []
    for token in answer:
        if token.escalation is not None:
            large = token.escalation.large
            assert large is not None
            firsts.append(len(ids))
            logprobs.append(math.nan if large.logprob is None else large.logprob)
        ids.append(token.token_id)
    return LargeAnswer(tuple(ids), tuple(firsts), tuple(logprobs))


class PlaceholderSmall(ForwardOnlySmall):
    """A small model of which only text and vocabulary are used: it decodes nothing.

    Several threads may use theirs at once.
    """

    # Tokenizers may be busy with one text only.
    _turn = threading.Lock()

    def __init__(self, small: SmallModel) -> None:
        self._small = small

    @property
    def vocabulary(self) -> Vocabulary:
        return self._small.vocabulary

    @property
    def context_length(self) -> int:
        return self._small.context_length

    def render(self, messages: Sequence[Message]) -> str:
        with self._turn:
            return self._small.render(messages)

    def encode_prompt(self, text: str) -> list[int]:
        with self._turn:
            return self._small.encode_prompt(text)

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        return _NOTHING, 0

    def extend(self, token_ids: Sequence[int]) -> Signals:
        return _NOTHING
