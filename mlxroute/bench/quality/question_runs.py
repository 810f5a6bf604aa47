"""The accuracy of answers: by each model alone, and routed within budgets."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from mlxroute.bench.quality.baselines import (
    UNCALIBRATED,
    BaselineRouter,
    QualityRouter,
    make_quality_router,
)
from mlxroute.bench.quality.comparisons import compare_sides, pair_with_best_baseline
from mlxroute.bench.quality.graded_answers import QualityResults, QualityRow
from mlxroute.bench.quality.large_logprobs import SideScores, score_sides
from mlxroute.bench.quality.majority import MajorityBench
from mlxroute.bench.quality.side_figures import side_figures
from mlxroute.bench.quality.sides import SMALL, QualitySide
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.engine import generate
from mlxroute.questions.grading import Grade, grade
from mlxroute.questions.prompt_form import describe_form
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.recorded.answer_scores import AnswerScores
from mlxroute.recorded.forward_only import PlaceholderSmall
from mlxroute.recorded.recording_large import AnswerNotContinued, RecordingLarge
from mlxroute.routers import Budget, always_escalate, never_escalate
from mlxroute.serving.concurrent_answers import ConcurrentAnswers, SharedSmallClient
from mlxroute.small import SmallModel
from mlxroute.types import Message, Mode, Progress, Source, StopReason, no_progress
from mlxroute.types.limits import MAX_PREFETCH

_TIMED_STEPS: Final = 5


def measure_step_s(
    small: SmallModel, question: Question, examples: Sequence[Question] = ()
) -> float:
    """Return the median seconds of a few decode steps after a question, as a run asks it."""
    conversation = question_messages(question, examples)
    return median_step_s(small, small.encode_conversation(conversation).ids)


def median_step_s(small: SmallModel, prompt_ids: Sequence[int]) -> float:
    """Return the median seconds of a few decode steps after a prompt."""
    signals, _ = small.prefill(prompt_ids)
    times_s = []
    for _ in range(_TIMED_STEPS):
        began_s = time.perf_counter()
        signals = small.step(signals.token_id)
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def bench_quality(  # noqa: PLR0913 - all of these are settings of one run
    small: SmallModel,
    large: RecordingLarge,
    questions: Sequence[Question],
    *,
    sides: Sequence[QualitySide],
    examples: Sequence[Question],
    ranks: ScoreRanks,
    max_tokens: int,
    step_s: float,
    results: QualityResults,
    compare: Sequence[tuple[str, str]] = (),
    chats: int = 1,
    accept_within: float = 0.0,
    scores: AnswerScores | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the report of all sides on all questions; answers in `results` are not repeated.

    `chats` questions are answered at a time, by all sides, in one batch. Question i belongs to chat
    i modulo `chats`; within a chat, a budget carries over to the next question. The reported
    seconds are computed, as if each answer were written alone: `step_s` for each token plus the
    time of its calls, without the prompt. `compare` names pairs of sides to compare; by default,
    each routed side is compared with the best baseline of its budget. Questions without a right
    answer are judged by agreement with the large model, and with `scores` also by its logprobs of
    the answers; scores in the file are not asked for again.
    """
    bench = _QualityBench(
        small,
        large,
        examples=examples,
        ranks=ranks,
        max_tokens=max_tokens,
        step_s=step_s,
        results=results,
        accept_within=accept_within,
    )
    rows = bench.answer_all(questions, sides, chats, progress)
    has_answers = all(question.answer is not None for question in questions)
    pairs = compare or pair_with_best_baseline(sides, rows, has_answers=has_answers)
    by_side: SideScores = {}
    unscored = None
    if scores is not None and not has_answers:
        conversations = [question_messages(question, examples) for question in questions]
        by_side, unscored = score_sides(small, large, scores, conversations, rows, progress)
    return {
        "small": small.name,
        "large": large.model_name,
        "questions": len(questions),
        "examples": len(examples),
        "form": describe_form(questions, examples),
        "tokens": max_tokens,
        "chats": chats,
        "accept_within": accept_within,
        "step_s": round(step_s, 5),
        "sides": {
            side.name: side_figures(
                side,
                rows,
                chats,
                max_tokens=max_tokens,
                has_answers=has_answers,
                scores=by_side.get(side.name, ()),
            )
            for side in sides
        },
        "unscored": unscored,
        "comparisons": compare_sides(pairs, rows, has_answers=has_answers),
    }


@dataclass(frozen=True, slots=True)
class _Task:
    """One question for one side; `key` is the key of the answer in the results."""

    side: QualitySide
    question: Question
    conversation: list[Message]
    router: QualityRouter
    key: str


@dataclass(frozen=True, slots=True)
class _QualityBench:
    """The settings that all answers of a run share."""

    small: SmallModel
    large: RecordingLarge
    examples: Sequence[Question]
    ranks: ScoreRanks
    max_tokens: int
    step_s: float
    results: QualityResults
    accept_within: float

    def answer_all(
        self,
        questions: Sequence[Question],
        sides: Sequence[QualitySide],
        chats: int,
        progress: Progress,
    ) -> dict[str, list[QualityRow]]:
        """Let every side answer every question; return the answers by side, in question order."""
        voting = [side for side in sides if side.samples]
        sides = [side for side in sides if not side.samples]
        routers = {(side, chat): self.new_router(side) for side in sides for chat in range(chats)}
        rows: dict[str, list[QualityRow]] = {side.name: [] for side in sides}
        # First, because it makes no call, and not every model can do it.
        for side in voting:
            rows[side.name] = self._majority(side.samples).answer_all(questions, progress)
        progress("questions", 0, len(questions))
        for begin in range(0, len(questions), chats):
            group = questions[begin : begin + chats]
            tasks = [
                self.new_task(side, question, routers[side, chat])
                for chat, question in enumerate(group)
                for side in sides
            ]
            for task, row in zip(tasks, self.answer(tasks), strict=True):
                rows[task.side.name].append(row)
            progress("questions", begin + len(group), len(questions))
        return rows

    def _majority(self, count: int) -> MajorityBench:
        return MajorityBench(
            self.small, self.examples, count, self.max_tokens, self.step_s, self.results
        )

    def new_router(self, side: QualitySide) -> QualityRouter:
        """Return a side's router in its state before the first question."""
        if side.router is None:
            return always_escalate() if side.is_large else never_escalate()
        return make_quality_router(side.router, side.budget, self.ranks[side.router])

    def new_task(self, side: QualitySide, question: Question, router: QualityRouter) -> _Task:
        """Return the task of answering a question with the router in its present state."""
        conversation = question_messages(question, self.examples)
        key = self._key(side, question, conversation, router)
        return _Task(side, question, conversation, router, key)

    def answer(self, tasks: Sequence[_Task]) -> list[QualityRow]:
        """Return the answers, saved or new, and bring the routers to their states after them.

        Each answer is saved once it is written, whatever becomes of the others.
        """
        saved = [self._find(task) for task in tasks]
        missing = [task for task, row in zip(tasks, saved, strict=True) if row is None]
        jobs = [(task.conversation, partial(self._write_answer, task)) for task in missing]
        answers = ConcurrentAnswers(self.small, on_abort=self.large.close)
        new_rows = iter(answers.run(jobs) if jobs else [])
        rows = []
        for task, row in zip(tasks, saved, strict=True):
            if row is None:
                row = next(new_rows)
            else:
                for score in row.scores:
                    _, task.router.state = task.router.state.decide(score)
            rows.append(row)
        return rows

    def _find(self, task: _Task) -> QualityRow | None:
        """Return a task's saved answer, graded and timed anew.

        The right answer, grading or the machine's speed may have changed. Equal programs are run
        once per process.
        """
        row = self.results.find(task.key)
        if row is None:
            return None
        grades = _grade(task.question, row.text)
        seconds = row.seconds
        if row.calls_s is not None:
            seconds = self._seconds(task.side, row.tokens, row.calls_s)
        return replace(row, strict=grades.strict, lenient=grades.lenient, seconds=seconds)

    def _seconds(self, side: QualitySide, tokens: int, calls_s: float) -> float:
        """Return the time of an answer: its calls, and a step for each token of the small model."""
        return round(calls_s + (0 if side.is_large else tokens) * self.step_s, 3)

    def _key(
        self,
        side: QualitySide,
        question: Question,
        conversation: Sequence[Message],
        router: QualityRouter,
    ) -> str:
        """Return the key of an answer: a hash of all that it depends on."""
        models = [self.small.record_name, self.large.recorded_name]
        # Single models and baselines, whose seed is the question, have no calibrated scores.
        uncalibrated = {None, *UNCALIBRATED}
        ranks = () if side.router in uncalibrated else self.ranks[str(side.router)]
        # The answer of one model alone does not depend on its router's state.
        state = _budget_text(router) if side.router else ""
        parts: list[object] = [
            *models,
            side.router,
            side.is_large,
            self.max_tokens,
            ranks,
            conversation,
            state,
        ]
        if side.router and self.accept_within:
            parts.append(self.accept_within)
        if question.kind is AnswerKind.CODE:
            parts.append(question.answer)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _write_answer(self, task: _Task, small: SharedSmallClient) -> QualityRow:
        """Write, grade and save one answer."""
        answer = self._new_answer(task, small)
        self.results.add(task.key, answer)
        return answer

    def _new_answer(self, task: _Task, small: SharedSmallClient) -> QualityRow:
        if not task.side.is_large:
            return self._generate_answer(task, small)
        if not self.large.is_approximate:
            try:
                return self._generate_answer(task, small)
            except AnswerNotContinued:
                pass
        return self._ask_whole_answer(task)

    def _generate_answer(self, task: _Task, small: SharedSmallClient) -> QualityRow:
        side = task.side
        view = self.large.new_view(large_only=side.is_large, blocked=small.blocked)
        if isinstance(task.router, BaselineRouter):
            task.router.begin_answer(small, seed=task.question.fingerprint)
        answer = generate(
            PlaceholderSmall(self.small) if side.is_large else small,
            None if side is SMALL else view,
            task.conversation,
            router=task.router,
            max_tokens=self.max_tokens,
            timeout_s=self.large.timeout_s,
            strict=True,
            mode=Mode.WAIT,
            # All positions are escalated, so a call returns many tokens that are used.
            prefetch=MAX_PREFETCH if side.is_large else 0,
            accept_within=self.accept_within if side.router else 0.0,
        )
        tokens = list(answer)
        # A token of the large model with several ids is one position.
        scores = [
            token.score for token in tokens if token.source is Source.SMALL or token.escalation
        ]
        stats = answer.stats()
        # A test of code takes a while.
        with small.blocked():
            grades = _grade(task.question, stats.text)
        calls_s = round(view.calls_s, 4)
        return QualityRow(
            question=task.question.name,
            text=stats.text,
            strict=grades.strict,
            lenient=grades.lenient,
            tokens=stats.tokens,
            escalated=stats.escalated,
            agreed=stats.agreed,
            unchecked=stats.unchecked,
            calls=stats.calls,
            uploaded_tokens=stats.uploaded_tokens,
            seconds=self._seconds(side, stats.tokens, calls_s),
            calls_s=calls_s,
            is_cut_off=stats.finish_reason is StopReason.LENGTH,
            scores=() if side.is_large else tuple(scores),
        )

    def _ask_whole_answer(self, task: _Task) -> QualityRow:
        """Ask the large model for its whole answer, and grade it."""
        whole = self.large.write_whole_answer(task.conversation, max_tokens=self.max_tokens)
        grades = _grade(task.question, whole.text)
        tokens = min(len(self.small.vocabulary.encode(whole.text)), self.max_tokens)
        return QualityRow(
            question=task.question.name,
            text=whole.text,
            strict=grades.strict,
            lenient=grades.lenient,
            tokens=tokens,
            escalated=tokens,
            agreed=0,
            unchecked=0,
            calls=1,
            uploaded_tokens=whole.prompt_tokens or 0,
            seconds=self._seconds(task.side, tokens, whole.seconds),
            calls_s=whole.seconds,
            # A server that withholds an answer gives no text and no end.
            is_cut_off=bool(whole.text) and not whole.ends,
            scores=(),
        )


def _grade(question: Question, text: str) -> Grade:
    """Grade an answer; it has no marks if the question has no right answer."""
    return Grade(None, None) if question.answer is None else grade(question, text)


def _budget_text(router: QualityRouter) -> str:
    """Return a budget's state as text; the keys of saved answers depend on its exact form."""
    state = router.state
    assert isinstance(state, Budget)
    return (
        f"Budget(rate={state.rate!r}, resolution={state.resolution!r}, rank={state.rank!r},"
        f" purse={state.bucket!r}, recent={state.recent!r}, ordered={state.ordered!r},"
        f" seen={state.positions!r})"
    )
