"""Adapting a small model to a large one: LoRA weights trained on the large model's answers.

Answers that their question's own answer proves wrong are not learned. One question in five is held
out, of those that no earlier training of the weights used. After about every half epoch, the loss
of the held-out answers and the small model's own accuracy on their questions decide whether the
weights are kept and the training goes on. Then follow on-policy rounds: the small model answers
with the best weights, and learns what the large one would write at each position of these answers
too.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from mlxroute.backend.adapter_folder import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    WEIGHTS_FILE,
    read_adapter_config,
)
from mlxroute.errors import UsageError
from mlxroute.questions.grading import grade
from mlxroute.questions.question_files import AnswerKind
from mlxroute.replace_file import replace_file
from mlxroute.small import SmallModel
from mlxroute.training.batch_size import choose_batch_size
from mlxroute.training.head_fitting import HELD_OUT_STRIDE, MIN_ANSWERS
from mlxroute.training.judged_questions import judge_answers
from mlxroute.training.labels import decode_answer
from mlxroute.training.lora_tuning import (
    LoraTuning,
    TrainingDiverged,
    can_share_prefix,
)
from mlxroute.training.on_policy import Corrector
from mlxroute.training.own_answers import measure_accuracy
from mlxroute.training.training_state import TrainingState
from mlxroute.training.tuning_examples import (
    Batch,
    TuningExample,
    answer_example,
    find_common_prefix,
    make_batches,
    shuffled_batches,
)
from mlxroute.training.tuning_types import (
    INTERRUPT,
    MAX_EVERY_FIFTH,
    UNFINISHED,
    HeldOutFigures,
    TuningOptions,
    TuningOutcome,
    WorkedAnswer,
)
from mlxroute.types import Progress, no_progress

BATCH_SIZE: Final = 8
_MAX_HELD_OUT: Final = MAX_EVERY_FIFTH // HELD_OUT_STRIDE
_JUDGED_PER_EPOCH: Final = 2


def split_answers(
    small: SmallModel, answers: Sequence[WorkedAnswer], *, known: Set[str] = frozenset()
) -> tuple[list[WorkedAnswer], list[WorkedAnswer]]:
    """Return the answers to train on and those that are held out.

    A prompt that occurs twice is used once, an answer without text not at all. Answers that are
    wrong by their question's own answer are not trained on. `known`, none by default, are the
    fingerprints of questions that the adapter of `small` was trained with; they are held out only
    if fewer than ten others are there. Raises UsageError for fewer than ten questions, and if fewer
    than ten of the answers to train on are right, or not all where they are fewer.
    """
    ends = small.vocabulary.eos_ids
    answers = [item for item in answers if not ends.issuperset(item.answer.token_ids)]
    unique = {item.question.fingerprint: item for item in answers}
    items = list(unique.values())
    if len(items) < MIN_ANSWERS:
        raise UsageError(
            f"an adapter needs at least {MIN_ANSWERS} different questions, not {len(items)};"
            " give more"
        )
    new = [item for item in items if item.question.fingerprint not in known]
    held_out = _hold_out(new if len(new) >= MIN_ANSWERS else items)
    names = {item.question.fingerprint for item in held_out}
    others = [item for item in items if item.question.fingerprint not in names]
    trained = [item for item in others if not _is_wrong(small, item)]
    needed = min(MIN_ANSWERS, len(others))
    if len(trained) < needed:
        advice = "give more questions"
        if any(item.question.kind is AnswerKind.TEXT and item.question.answer for item in others):
            # A sentence is hardly ever repeated word for word, however many questions there are.
            advice += ", or shorten `answer` to words that every right text has, or leave it out"
        raise UsageError(
            f"only {len(trained)} of the large model's {len(others)} answers to train on are right;"
            f" at least {needed} are needed, so {advice}"
        )
    return trained, held_out


def _hold_out(items: Sequence[WorkedAnswer]) -> list[WorkedAnswer]:
    """Return one item in five, or the highest number of them, spread evenly over all."""
    if len(items) <= MAX_EVERY_FIFTH:
        return list(items[::HELD_OUT_STRIDE])
    return [items[number * len(items) // _MAX_HELD_OUT] for number in range(_MAX_HELD_OUT)]


def _is_wrong(small: SmallModel, item: WorkedAnswer) -> bool:
    if item.question.answer is None:
        return False
    return grade(item.question, decode_answer(small, item.answer.token_ids)).lenient is not True


def adapt_to_answers(
    small: SmallModel,
    trained: Sequence[WorkedAnswer],
    held_out: Sequence[WorkedAnswer],
    options: TuningOptions,
    *,
    folder: Path,
    provenance: Mapping[str, Any],
    corrector: Corrector | None = None,
    progress: Progress = no_progress,
) -> TuningOutcome:
    """Train LoRA weights of the small model, and keep the best in a folder.

    The model itself has the last weights afterwards. The folder is written as soon as weights are
    better than all before; `provenance` is kept with them. `corrector` is the large model for the
    on-policy rounds; without it (the default) there are none. An interrupt or a divergence ends the
    training, and is raised only if no weights were kept until then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training(
        small, trained, held_out, options, folder=folder, provenance=provenance, progress=progress
    )
    return training.run(corrector)


@dataclass(frozen=True, slots=True)
class _RoundData:
    """What is trained on and judged by in one round: batches, each of some examples."""

    trained: Sequence[Batch]
    held_out: Sequence[Batch]
    epochs: int


class _Training:
    """One training, with what it is judged by."""

    def __init__(
        self,
        small: SmallModel,
        trained: Sequence[WorkedAnswer],
        held_out: Sequence[WorkedAnswer],
        options: TuningOptions,
        *,
        folder: Path,
        provenance: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._small = small
        self._options = options
        self._folder = folder
        self._progress = progress
        self._config = (
            options.shape.config() if options.start is None else read_adapter_config(options.start)
        )
        self._conversations = [item.conversation for item in (*trained, *held_out)]
        self._has_gold = all(item.question.answer is not None for item in held_out)
        self._judged = judge_answers(small, held_out, by_rows=self._has_gold)
        self._counts = {"trained": len(trained), "held_out": len(held_out)}
        self._report_header: dict[str, Any] = {**provenance, "answers": self._counts}
        examples = make_examples(small, [*trained, *held_out])
        # In on-policy rounds the own answers to all questions are examples.
        self._longest_prompt_ids = max((item.prompt_ids for item in examples), key=len)
        self._prefix_ids: tuple[int, ...] = ()
        if can_share_prefix(small.model):
            self._prefix_ids = find_common_prefix(examples)
        # The loss of wrong answers should not fall. If all are wrong, there is no other measure.
        is_judged = [not _is_wrong(small, item) for item in held_out]
        if not any(is_judged):
            is_judged = [True] * len(held_out)
        self._trained_examples = examples[: len(trained)]
        self._held_out_examples = list(itertools.compress(examples[len(trained) :], is_judged))
        self._tuning = LoraTuning(
            small.model,
            options.shape if options.start is None else None,
            learning_rate=options.learning_rate,
            prefix_ids=self._prefix_ids,
        )
        self._began_s = time.monotonic()
        self._state = TrainingState(judged=len(self._judged))
        if options.interrupted is not None:
            self._state.resume(options.interrupted)

    def run(self, corrector: Corrector | None) -> TuningOutcome:
        """Train until the held-out figures, or the numbers of epochs and rounds, end it."""
        state, size = self._state, BATCH_SIZE
        if not self._options.skip_memory_check:
            examples = [*self._trained_examples, *self._held_out_examples]
            if corrector is not None:
                # Own answers may be longer than the large model's.
                own_answer = [0] * self._options.max_tokens
                examples.append(answer_example(self._longest_prompt_ids, own_answer))
            prefix = len(self._prefix_ids)
            size = choose_batch_size(
                self._tuning,
                [item.without(prefix) for item in examples],
                prefix=prefix,
                largest=BATCH_SIZE,
            )
        self._report_header["read_at_once"] = size
        try:
            self._train_rounds(corrector, size)
        except (KeyboardInterrupt, TrainingDiverged) as exc:
            if state.best is None:
                raise
            state.ended_by = INTERRUPT if isinstance(exc, KeyboardInterrupt) else "divergence"
        # An interrupted last round is not begun again.
        state.ended_by = state.ended_by or "epochs"
        report = self._report()
        if state.best is not None:
            self._write_report()
        return TuningOutcome(tuple(state.figures), state.best, state.ended_by, report)

    def _train_rounds(self, corrector: Corrector | None, size: int) -> None:
        """Train on the large model's answers, then in on-policy rounds, from where a run ended."""
        state = self._state
        done = 0 if state.best is None else state.best.round
        if done == state.ended_rounds == 0:
            epochs = self._options.epochs
            data = self._round_data(
                self._trained_examples, self._held_out_examples, size, epochs=epochs
            )
            self._train(0, data, size)
        if corrector is None or state.best is None:
            return
        for number in range(done + 1, self._options.rounds + 1):
            # Only the rounds before this one have ended.
            state.ended_by = ""
            state.ended_rounds = number
            self._write_report()
            self._train(number, self._correct(number, corrector, size), size)
            if state.best.round < number:
                # The same weights would write the same answers again.
                return

    def _correct(self, number: int, corrector: Corrector, size: int) -> _RoundData:
        """Return the large model's answers, and own answers of the best weights, corrected."""
        self._tuning.read_weights(self._folder / WEIGHTS_FILE)
        corrections = corrector.correct_own_answers(
            self._small,
            self._conversations,
            max_tokens=self._options.max_tokens,
            progress=self._progress,
        )
        figures = {"agreement": round(corrections.agreement, 4)}
        self._state.corrections.append(
            {"round": number, **figures, "incomplete": corrections.incomplete}
        )
        count = len(self._trained_examples)
        trained = [*self._trained_examples, *filter(None, corrections.examples[:count])]
        held_out = [*self._held_out_examples, *filter(None, corrections.examples[count:])]
        return self._round_data(trained, held_out, size, epochs=1)

    def _round_data(
        self,
        trained: Sequence[TuningExample],
        held_out: Sequence[TuningExample],
        size: int,
        *,
        epochs: int,
    ) -> _RoundData:
        prefix = len(self._prefix_ids)
        return _RoundData(
            make_batches([example.without(prefix) for example in trained], size),
            make_batches([example.without(prefix) for example in held_out], size),
            epochs,
        )

    def _train(self, number: int, data: _RoundData, size: int) -> None:
        """Train for one round, the first of which has number 0."""
        accumulate = BATCH_SIZE // size
        # Whole updates only, and no more than the epochs hold.
        batches = len(data.trained)
        steps = accumulate * max(1, round(batches / accumulate / _JUDGED_PER_EPOCH))
        total = accumulate * max(1, data.epochs * batches // accumulate)
        label = f"training steps, round {number}" if number else "training steps"
        state = self._state
        state.ended_by = ""
        begin = 0
        if state.best is not None and state.best.round == number:
            updates = state.best.updates or round(state.best.epoch * batches / accumulate)
            begin = accumulate * updates
        else:
            state.figures.append(self._judge(number, 0.0, data.held_out))
        stream = shuffled_batches(data.trained, skip=begin)
        counter = itertools.count(begin)
        self._progress(label, next(counter), total)
        self._tuning.schedule(total // accumulate, done=begin // accumulate)
        while begin < total:
            end = min(begin + steps, total)
            self._tuning.train(
                stream,
                steps=end - begin,
                accumulate=accumulate,
                on_step=lambda: self._progress(label, next(counter), total),
            )
            figures = self._judge(number, end / batches, data.held_out)
            figures = replace(figures, updates=end // accumulate)
            begin = end
            is_best = state.is_best(figures)
            state.ended_by = state.end_reason(figures)
            state.figures.append(figures)
            if is_best:
                self._write(figures)
            if state.ended_by:
                return
        state.ended_by = "epochs"

    def _judge(self, number: int, epoch: float, batches: Sequence[Batch]) -> HeldOutFigures:
        loss = self._tuning.mean_loss(batches)
        accuracy = measure_accuracy(
            self._small,
            self._judged,
            max_tokens=self._options.max_tokens,
            progress=self._progress,
        )
        return HeldOutFigures(number, round(epoch, 2), round(loss, 4), round(accuracy, 4))

    def _report(self) -> dict[str, Any]:
        state = self._state
        ended_by = state.ended_by or UNFINISHED[-1]
        # Where to go on; a training that has ended does not.
        place = {"ended_rounds": state.ended_rounds} if ended_by in UNFINISHED else {}
        return {
            **self._report_header,
            "judged_by": "answers" if self._has_gold else "large model",
            "unjudged": self._counts["held_out"] - len(self._judged),
            "figures": [asdict(figures) for figures in state.figures],
            "kept": None if state.best is None else asdict(state.best),
            "corrections": state.corrections,
            **place,
            "ended_by": ended_by,
            "seconds": round(time.monotonic() - self._began_s),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
        }

    def _write(self, figures: HeldOutFigures) -> None:
        """Write the folder of the adapter, whose weights have these figures."""
        is_first = self._state.best is None
        try:
            # First, because a folder with a configuration alone counts as new after a kill.
            self._write_config()
            self._tuning.write_weights(self._folder / WEIGHTS_FILE)
            # Not before: after an interrupt the report is of the weights that are there.
            self._state.best = figures
            self._write_report()
        except BaseException as exc:
            if is_first and (self._state.best is None or isinstance(exc, OSError)):
                # Without a provenance the same command could not begin again in this folder.
                for name in (WEIGHTS_FILE, CONFIG_FILE):
                    (self._folder / name).unlink(missing_ok=True)
            raise

    def _write_config(self) -> None:
        """Write the shape of the weights."""
        replace_file(self._folder / CONFIG_FILE, json.dumps(self._config, indent=1).encode())

    def _write_report(self) -> None:
        """Write the provenance of the weights."""
        text = json.dumps(self._report(), indent=1)
        replace_file(self._folder / PROVENANCE_FILE, text.encode())


def make_examples(small: SmallModel, answers: Sequence[WorkedAnswer]) -> list[TuningExample]:
    """Return the examples that predict the answers in the small model's vocabulary."""
    return [
        answer_example(
            small.encode_conversation(item.conversation).ids,
            item.answer.token_ids,
            dict(zip(item.answer.token_starts, item.answer.choices, strict=True)),
        )
        for item in answers
    ]
