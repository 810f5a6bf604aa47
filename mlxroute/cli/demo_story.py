"""The demo's three answers to one question: by the small model, by both, by the large model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mlxroute.cli.demo_tables import (
    list_escalations,
    result_text,
    table_of_answers,
    table_of_escalations,
)
from mlxroute.cli.exit_codes import EXIT_LARGE_FAILED, EXIT_OK
from mlxroute.cli.failure_notes import FailureNotes
from mlxroute.cli.terminal import print_labelled, print_table
from mlxroute.engine import generate
from mlxroute.engine.escalation.failures import failure_kind
from mlxroute.errors import LargeNotContinued
from mlxroute.questions.demo_question import DemoQuestion, find_conclusion
from mlxroute.recorded.forward_only import PlaceholderSmall
from mlxroute.routers import always_escalate, never_escalate
from mlxroute.safe_text import printable_line
from mlxroute.types import (
    Message,
    Mode,
    OnFailure,
    Progress,
    RunStats,
    Sampling,
    Signals,
    Token,
    ignore_failure,
)
from mlxroute.types.limits import MAX_PREFETCH
from mlxroute.view import (
    DemoAnswer,
    LiveView,
    closing_paragraph,
    describe_choice,
    describe_outcome,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.catalog import Pair
    from mlxroute.cli.session import Session
    from mlxroute.engine import Answer
    from mlxroute.engine.protocols import SmallProtocol
    from mlxroute.view import AnswerStream

MAX_TOKENS: Final = 160
_NOT_CONTINUED: Final = failure_kind(LargeNotContinued())
_NEXT_COMMANDS: Final = (
    ('mlxroute demo --question "..."', "asks your own question"),
    ("mlxroute demo --heat", "shades each token by how unsure the small model was"),
    ("mlxroute host", "keeps a large model running for `mlxroute chat`"),
)


@dataclass(frozen=True, slots=True)
class Story:
    """The demo's answers with the tokens of the routed one."""

    small: DemoAnswer
    routed: DemoAnswer
    large: DemoAnswer
    routed_tokens: tuple[Token, ...]

    @property
    def has_large_failed(self) -> bool:
        """Whether the large model failed; `not continued` in the routed answer does not count."""
        kinds = {failure.kind for failure in self.routed.stats.failures}
        return bool(self.large.stats.failures) or bool(kinds - {_NOT_CONTINUED})


def tell_story(
    session: Session,
    pair: Pair,
    question: DemoQuestion,
    *,
    heat: bool,
    out: Console,
    err: Console,
) -> int:
    """Let both models and each alone answer a question, live, and say what came out.

    Returns the exit code, which tells whether the large model failed.
    Raises KeyboardInterrupt after a Ctrl-C during an answer.
    """
    stage = _Stage(question, heat=heat, out=out, err=err)
    threshold = session.routing.threshold
    err.print(f"\n> {question.prompt}", style="bold")
    story = _answer_three_times(session, pair, question, stage)
    err.print()
    answers = (story.small, story.routed, story.large)
    print_table(err, table_of_answers(answers, err))
    if rows := list_escalations(story.routed_tokens, session.small.vocabulary):
        err.print()
        print_table(err, table_of_escalations(rows, err))
    paragraphs = [
        describe_outcome(
            story.small, story.routed, story.large, is_measured_pair=pair.name == question.pair
        ),
        closing_paragraph(
            story.routed.stats,
            small=pair.small,
            large=pair.large,
            threshold=threshold,
            allowance=session.routing.describe_budget(),
        ),
    ]
    if question.candidates:
        choice = describe_choice(
            pair=question.pair,
            candidates=question.candidates,
            small_wrong=question.small_wrong,
            corrected=question.corrected,
            small_right=question.small_right,
            spoiled=question.spoiled,
        )
        paragraphs.insert(1, choice)
    for paragraph in filter(None, paragraphs):
        err.print()
        err.print(paragraph)
    err.print("\nNext:")
    width = max(len(command) for command, _ in _NEXT_COMMANDS)
    for command, effect in _NEXT_COMMANDS:
        print_labelled(err, f"{command:{width}}  ", effect)
    return EXIT_LARGE_FAILED if story.has_large_failed else EXIT_OK


def _answer_three_times(
    session: Session, pair: Pair, question: DemoQuestion, stage: _Stage
) -> Story:
    messages: list[Message] = [{"role": "user", "content": question.prompt}]
    assert session.large is not None
    alone = generate(
        session.small,
        None,
        messages,
        router=never_escalate(),
        max_tokens=MAX_TOKENS,
    )
    small = stage.show(alone, f"1. {pair.small} alone", f"{pair.small} alone", math.inf)
    routing = session.routing
    rule = routing.describe()
    if (allowance := routing.describe_budget()) is not None:
        rule = f"where it is least sure, for at most {allowance}"
    heading = f"2. {pair.small}, asking {pair.large} {rule}"
    answer = session.answer(messages, on_failure=stage.notes)
    routed = stage.show(answer, heading, "The routed answer", routing.threshold)
    last = large_alone(session, messages, on_failure=stage.notes)
    large = stage.show(last, f"3. {pair.large} alone", f"{pair.large} alone", -math.inf)
    return Story(small, routed, large, tuple(answer.tokens))


def large_alone(
    session: Session, messages: Sequence[Message], *, on_failure: OnFailure = ignore_failure
) -> Answer:
    """Return the large model's own answer, streamed, which ends early where a call fails."""
    return generate(
        _EndingSmall(session.small),
        session.large,
        messages,
        router=always_escalate(),
        max_tokens=MAX_TOKENS,
        timeout_s=session.timeout_s,
        never_send=session.never_send,
        mode=Mode.WAIT,
        prefetch=MAX_PREFETCH,
        on_failure=on_failure,
    )


def _failure(stats: RunStats) -> str | None:
    """Return why an answer of the large model alone is not complete; None if it is."""
    if stats.withheld:
        return "kept local by --never-send"
    if stats.failures:
        return stats.failures[0].reason
    return "the server did not answer" if stats.unchecked else None


class _EndingSmall(PlaceholderSmall):
    """A small model that decodes nothing and ends the answer at a position left to it."""

    def __init__(self, small: SmallProtocol) -> None:
        super().__init__(small)
        self._end_id = next(iter(small.vocabulary.eos_ids), 0)

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        signals, reused = super().prefill(prompt_ids, sampling=sampling, progress=progress)
        return replace(signals, token_id=self._end_id), reused

    def extend(self, token_ids: Sequence[int]) -> Signals:
        return replace(super().extend(token_ids), token_id=self._end_id)


class _Stage:
    """Shows one answer after the other, and judges each."""

    def __init__(self, question: DemoQuestion, *, heat: bool, out: Console, err: Console) -> None:
        self._question = question
        self._heat = heat
        self._out = out
        self._err = err
        self.notes = FailureNotes(out, err)

    def show(self, answer: AnswerStream, heading: str, writer: str, threshold: float) -> DemoAnswer:
        """Show an answer live below its heading, and return it judged."""
        self._err.print()
        self._err.print(heading, style="bold cyan")
        stats = LiveView(self._out, heat=self._heat, threshold=threshold).show(answer)
        self.notes.flush()
        conclusion = find_conclusion(stats.text)
        shown = DemoAnswer(
            writer=writer,
            stats=stats,
            is_judged=bool(self._question.answers),
            is_right=self._question.judge(stats.text),
            conclusion=printable_line(conclusion, limit=40) if conclusion else None,
            failure=_failure(stats) if threshold == -math.inf else None,
        )
        self._err.print(result_text(shown))
        return shown
