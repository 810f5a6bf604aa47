"""Random schedules of answers that join, leave and are cancelled at any time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mlxroute.serving import AnswerScheduler, RunningAnswer
from mlxroute.serving.requests import ServedEvent
from mlxroute.small import SmallModel
from mlxroute.types import LargeContext, Token
from tests.serving.conftest import PROMPTS, ReleasedLarge, alone, choose_by_text, request

# Three of the tiny model's buffers.
_CACHE_BYTES = 400_000
_THRESHOLDS = [5.58, float("inf")]


def choose(context: LargeContext) -> int:
    return choose_by_text(context.token_ids)


class Schedules(RuleBasedStateMachine):
    """Whatever the schedule, an answer has the text that it has alone, or the start of it."""

    small: SmallModel
    answers = Bundle("answers")

    def __init__(self) -> None:
        super().__init__()
        self.large = ReleasedLarge(choose)
        self.scheduler = AnswerScheduler(
            self.small, self.large, max_running=3, max_queued=100, cache_bytes=_CACHE_BYTES
        )
        self.read: dict[RunningAnswer, tuple[Iterator[ServedEvent | None], list[int], list[int]]]
        self.read = {}

    @rule(
        target=answers,
        prompt=st.sampled_from(PROMPTS),
        threshold=st.sampled_from(_THRESHOLDS),
        max_tokens=st.sampled_from([1, 7, 16]),
        exact=st.booleans(),
    )
    def submit(self, prompt: str, threshold: float, max_tokens: int, exact: bool) -> RunningAnswer:
        expected = self.expected(prompt, threshold)[:max_tokens]
        answer = self.scheduler.submit(
            request(prompt, threshold=threshold, max_tokens=max_tokens, exact=exact)
        )
        self.read[answer] = answer.events(), [], expected
        return answer

    @classmethod
    def expected(cls, prompt: str, threshold: float) -> list[int]:
        large = ReleasedLarge(choose)
        return alone(
            cls.small, prompt, large=large, threshold=threshold, max_tokens=16, mode="wait"
        )

    @rule(answer=answers, count=st.integers(1, 8))
    def read_some(self, answer: RunningAnswer, count: int) -> None:
        events, ids, _ = self.read[answer]
        ids += [e.token_id for e in itertools.islice(events, count) if isinstance(e, Token)]

    @rule(answer=consumes(answers))
    def cancel(self, answer: RunningAnswer) -> None:
        answer.cancel()
        events, ids, expected = self.read.pop(answer)
        ids += [event.token_id for event in events if isinstance(event, Token)]
        assert ids == expected[: len(ids)]

    @rule(answer=consumes(answers))
    def finish(self, answer: RunningAnswer) -> None:
        events, ids, expected = self.read.pop(answer)
        ids += [event.token_id for event in events if isinstance(event, Token)]
        assert ids == expected

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.scheduler.figures().cache_bytes <= _CACHE_BYTES

    def teardown(self) -> None:
        self.scheduler.close()
        assert all(answer.ended for answer in self.read)
        assert not len(self.scheduler._device._batch)


def test_any_schedule_leaves_the_texts_as_they_are_alone(small: SmallModel) -> None:
    machine = type("SchedulesOfModel", (Schedules,), {"small": small})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
