"""Answer documents of scripted models."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from mlxroute.answers.document import AnswerDocument, ModelPair, OptionsRecord
from mlxroute.answers.recorded_answer import AnswerOrigin, RecordedAnswer
from mlxroute.answers.reply_recorder import ReplyRecorder
from mlxroute.answers.router_record import record_router
from mlxroute.engine import Answer
from mlxroute.engine.options import Options
from mlxroute.engine.protocols import NamedLargeProtocol, SmallProtocol
from mlxroute.routers import EntropyRouter, Router
from mlxroute.types import Message, Mode
from tests.support.scripted_models import ScriptedLarge, ScriptedReply, ScriptedSmall

QUESTION: list[Message] = [{"role": "user", "content": "hi?"}]
PAIR = ModelPair("tiny", "tiny", None, "huge", "http://127.0.0.1:1/v1")
OPTIONS = OptionsRecord(Mode.WAIT, 0, None, 0.0, 64, (), 0.0, 1.0, None, 0)


def record_answer(
    small: SmallProtocol,
    large: NamedLargeProtocol | None,
    *,
    router: Router | None = None,
    messages: Sequence[Message] = QUESTION,
    mode: Mode = Mode.WAIT,
    prefetch: int | None = 0,
    never_send: Sequence[re.Pattern[str]] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> RecordedAnswer:
    """Return an answer of these models that records itself; by default above 1 nat."""
    router = EntropyRouter(1.0) if router is None else router
    origin = AnswerOrigin(messages, small.vocabulary, PAIR, record_router(router), OPTIONS)
    recorder = None if large is None else ReplyRecorder(large)
    options = Options(mode=mode, prefetch=prefetch, max_tokens=64, never_send=tuple(never_send))
    answer = Answer(small, recorder, messages, router=router, options=options, clock=clock)
    return RecordedAnswer(answer, origin, recorder)


def make_document(
    script: bytes = b"a cat.",
    replies: Sequence[ScriptedReply] = (b"d",),
    *,
    unsure: Sequence[int] = (2,),
    messages: Sequence[Message] = QUESTION,
) -> AnswerDocument:
    """Return the document of a scripted answer whose small model is unsure at some positions."""
    small = ScriptedSmall(script, entropies=dict.fromkeys(unsure, 2.0))
    answer = record_answer(small, ScriptedLarge(replies), messages=messages)
    for _ in answer:
        pass
    return answer.document()
