"""Adapting a small model to a large one: LoRA weights trained on the large model's answers.

One answer in five is held out. After every half epoch, the loss of the held-out answers and the
small model's own accuracy on their questions decide whether the weights are kept and the training
goes on. Then follow on-policy rounds: the small model answers with the best weights, and learns
what the large one would write at each position of these answers too.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from mlxroute.questions.question_files import Question
from mlxroute.recorded.large_answers import LargeAnswer
from mlxroute.replace_file import replace_file
from mlxroute.small import SmallModel
from mlxroute.training.batch_size import choose_batch_size
from mlxroute.training.held_out_answers import (
    HeldOutAnswer,
    judged_by_gold,
    measure_accuracy,
    standard_error,
)
from mlxroute.training.labels import decode_answer
from mlxroute.training.lora_tuning import (
    LoraShape,
    LoraTuning,
    TrainingDiverged,
    can_share_prefix,
)
from mlxroute.training.on_policy import Corrector
from mlxroute.training.tuning_examples import (
    Batch,
    TuningExample,
    answer_example,
    find_common_prefix,
    make_batches,
    shuffled_batches,
)
from mlxroute.types import Message, Progress, no_progress

BATCH_SIZE: Final = 8
MIN_ANSWERS: Final = 10
_HELD_OUT_STRIDE: Final = 5
_MAX_HELD_OUT: Final = 48
_JUDGED_PER_EPOCH: Final = 2
# Training ends when the held-out loss did not fall so many times in a row.
_PATIENCE: Final = 2


@dataclass(frozen=True, slots=True)
class WorkedAnswer:
    """A question, the conversation that asks it, and the large model's answer."""

    question: Question
    conversation: Sequence[Message]
    answer: LargeAnswer


@dataclass(frozen=True, slots=True)
class HeldOutFigures:
    """Figures of the held-out answers after some epochs.

    Args:
        round: Number of the on-policy round, 0 before the first.
        epoch: How often each answer was trained on.
        loss: Mean loss of the large model's tokens, in nats; each round has other held-out tokens.
        accuracy: Share of the questions that the small model answers right.
    """

    round: int
    epoch: float
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """The settings of one training.

    Args:
        shape: Size of a new adapter.
        rounds: Number of on-policy rounds after the training; 0 by default.
        start: Folder of the adapter that the model was loaded with, which is trained further. None
            (default) for a new one.
        learning_rate: Step size of the optimiser.
        epochs: Greatest number of times that each answer is trained on.
        max_tokens: Maximum length of the small model's own answers.
        skip_memory_check: Whether to train even if memory seems too small. False by default.
    """

    shape: LoraShape
    learning_rate: float
    epochs: int
    max_tokens: int
    rounds: int = 0
    start: Path | None = None
    skip_memory_check: bool = False


@dataclass(frozen=True, slots=True)
class TuningOutcome:
    """What a training did.

    Args:
        figures: Held-out figures: before the training, and after each half epoch.
        best: Those of the weights that were kept; None if none were better than before.
        ended_by: What ended the training: `epochs`, `held-out loss`, `held-out accuracy`,
            `interrupt` or `divergence`.
        report: All of this and the settings, as in the provenance.
    """

    figures: tuple[HeldOutFigures, ...]
    best: HeldOutFigures | None
    ended_by: str
    report: Mapping[str, Any]


def split_answers(
    answers: Sequence[WorkedAnswer],
) -> tuple[list[WorkedAnswer], list[WorkedAnswer]]:
    """Return the answers to train on and those that are held out.

    A prompt that occurs twice is used once. Raises UsageError for fewer than ten answers.
    """
    unique = {item.question.fingerprint: item for item in answers if item.answer.token_ids}
    items = list(unique.values())
    if len(items) < MIN_ANSWERS:
        raise UsageError(
            f"an adapter needs at least {MIN_ANSWERS} different questions, not {len(items)};"
            " give more"
        )
    held_out = items[::_HELD_OUT_STRIDE][:_MAX_HELD_OUT]
    names = {item.question.fingerprint for item in held_out}
    return [item for item in items if item.question.fingerprint not in names], held_out


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
    training = _Training(small, trained, held_out, options, folder, progress)
    return training.run(corrector, dict(provenance))


@dataclass(frozen=True, slots=True)
class _Section:
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
        folder: Path,
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
        self._trained_count = len(trained)
        self._held_out = [
            HeldOutAnswer(
                item.question, item.conversation, decode_answer(small, item.answer.token_ids)
            )
            for item in held_out
        ]
        self._examples = make_examples(small, [*trained, *held_out])
        self._prefix_ids: tuple[int, ...] = ()
        if can_share_prefix(small.model):
            self._prefix_ids = find_common_prefix(self._examples)
        self._tuning = LoraTuning(
            small.model,
            options.shape if options.start is None else None,
            learning_rate=options.learning_rate,
            prefix_ids=self._prefix_ids,
        )
        self._began_s = time.monotonic()
        self._figures: list[HeldOutFigures] = []
        self._best: HeldOutFigures | None = None
        self._corrections: list[dict[str, Any]] = []
        self._ended_by = ""

    def run(self, corrector: Corrector | None, provenance: dict[str, Any]) -> TuningOutcome:
        """Train until the held-out figures, or the numbers of epochs and rounds, end it."""
        size = BATCH_SIZE
        if not self._options.skip_memory_check:
            examples = self._examples
            if corrector is not None:
                # Own answers may be longer than the large model's.
                prompt_ids = max((item.prompt_ids for item in examples), key=len)
                examples = [*examples, answer_example(prompt_ids, [0] * self._options.max_tokens)]
            prefix = len(self._prefix_ids)
            size = choose_batch_size(
                self._tuning,
                [item.without(prefix) for item in examples],
                prefix=prefix,
                largest=BATCH_SIZE,
            )
        self._settings = {
            **provenance,
            "answers": {"trained": self._trained_count, "held_out": len(self._held_out)},
            "read_at_once": size,
        }
        try:
            trained, held_out = (
                self._examples[: self._trained_count],
                self._examples[self._trained_count :],
            )
            self._train(
                0, self._section(trained, held_out, size, epochs=self._options.epochs), size
            )
            if corrector is not None and self._best is not None:
                for number in range(1, self._options.rounds + 1):
                    self._train(number, self._correct(number, corrector, size), size)
                    if self._best.round < number:
                        # The same weights would write the same answers again.
                        break
        except (KeyboardInterrupt, TrainingDiverged) as exc:
            if self._best is None:
                raise
            self._ended_by = "interrupt" if isinstance(exc, KeyboardInterrupt) else "divergence"
        report = self._report()
        if self._best is not None:
            self._write_provenance()
        return TuningOutcome(tuple(self._figures), self._best, self._ended_by, report)

    def _correct(self, number: int, corrector: Corrector, size: int) -> _Section:
        """Return the large model's answers, and own answers of the best weights, corrected."""
        self._tuning.read_weights(self._folder / WEIGHTS_FILE)
        corrections = corrector.correct_own_answers(
            self._small,
            self._conversations,
            max_tokens=self._options.max_tokens,
            progress=self._progress,
        )
        figures = {"agreement": round(corrections.agreement, 4)}
        self._corrections.append({"round": number, **figures, "incomplete": corrections.incomplete})
        count = self._trained_count
        trained, held_out = self._examples[:count], self._examples[count:]
        trained = [*trained, *filter(None, corrections.examples[:count])]
        held_out = [*held_out, *filter(None, corrections.examples[count:])]
        return self._section(trained, held_out, size, epochs=1)

    def _section(
        self,
        trained: Sequence[TuningExample],
        held_out: Sequence[TuningExample],
        size: int,
        *,
        epochs: int,
    ) -> _Section:
        prefix = len(self._prefix_ids)
        return _Section(
            make_batches([example.without(prefix) for example in trained], size),
            make_batches([example.without(prefix) for example in held_out], size),
            epochs,
        )

    def _train(self, number: int, section: _Section, size: int) -> None:
        """Train for one round, the first of which has number 0."""
        accumulate = BATCH_SIZE // size
        # Whole updates only.
        updates = max(1, round(len(section.trained) / accumulate / _JUDGED_PER_EPOCH))
        steps = accumulate * updates
        total = _JUDGED_PER_EPOCH * section.epochs * steps
        label = f"training steps, round {number}" if number else "training steps"
        stream = shuffled_batches(section.trained)
        self._ended_by = ""
        self._figures.append(self._judge(number, 0.0, section.held_out))
        counter = itertools.count(1)
        self._progress(label, 0, total)
        for done in range(steps, total + 1, steps):
            with tempfile.TemporaryDirectory() as scratch:
                self._tuning.train(
                    stream,
                    steps=steps,
                    accumulate=accumulate,
                    latest=Path(scratch) / WEIGHTS_FILE,
                    on_step=lambda _: self._progress(label, next(counter), total),
                )
            figures = self._judge(number, done / len(section.trained), section.held_out)
            if self._add_figures(figures):
                self._write()
            if self._ended_by:
                return
        self._ended_by = "epochs"

    def _judge(self, number: int, epoch: float, batches: Sequence[Batch]) -> HeldOutFigures:
        loss = self._tuning.mean_loss(batches)
        accuracy = measure_accuracy(
            self._small, self._held_out, max_tokens=self._options.max_tokens
        )
        return HeldOutFigures(number, round(epoch, 2), round(loss, 4), round(accuracy, 4))

    def _add_figures(self, figures: HeldOutFigures) -> bool:
        """Return whether weights are the best so far; end the training where they get worse.

        The best have the lowest loss. The training ends when the accuracy falls more than its
        standard error below the highest so far, or when the loss did not fall twice in a row.
        """
        highest = max(item.accuracy for item in self._figures)
        before = [item for item in self._figures if item.round == figures.round]
        lowest = min(before, key=lambda item: item.loss)
        error = standard_error(highest, len(self._held_out))
        self._figures.append(figures)
        if figures.accuracy < highest - error:
            self._ended_by = "held-out accuracy"
        elif figures.loss < lowest.loss:
            self._best = figures
            return True
        elif len(before) - before.index(lowest) >= _PATIENCE:
            self._ended_by = "held-out loss"
        return False

    def _report(self) -> dict[str, Any]:
        return {
            **self._settings,
            "judged_by": "answers" if judged_by_gold(self._held_out) else "large model",
            "figures": [asdict(figures) for figures in self._figures],
            "kept": None if self._best is None else asdict(self._best),
            "corrections": self._corrections,
            "ended_by": self._ended_by or "unfinished",
            "seconds": round(time.monotonic() - self._began_s),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
        }

    def _write(self) -> None:
        """Write the folder of the adapter."""
        self._tuning.write_weights(self._folder / WEIGHTS_FILE)
        replace_file(self._folder / CONFIG_FILE, json.dumps(self._config, indent=1).encode())
        self._write_provenance()

    def _write_provenance(self) -> None:
        text = json.dumps(self._report(), indent=1)
        replace_file(self._folder / PROVENANCE_FILE, text.encode())


def make_examples(small: SmallModel, answers: Sequence[WorkedAnswer]) -> list[TuningExample]:
    """Return the examples that predict the answers in the small model's vocabulary."""
    return [
        answer_example(small.encode_conversation(item.conversation).ids, item.answer.token_ids)
        for item in answers
    ]
