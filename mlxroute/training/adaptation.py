"""Adapting a small model to a large one: LoRA weights trained on the large model's answers.

One answer in five is held out. After every half epoch, the loss of the held-out answers and the
small model's own accuracy on their questions decide whether the weights are kept and the training
goes on.
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
from mlxroute.backend.memory import available_bytes
from mlxroute.errors import NotEnoughSpace, UsageError
from mlxroute.questions.question_files import Question
from mlxroute.recorded.large_answers import LargeAnswer
from mlxroute.replace_file import replace_file
from mlxroute.small import SmallModel
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
from mlxroute.training.tuning_examples import (
    Batch,
    TuningExample,
    answer_example,
    make_batches,
    shuffled_batches,
    split_prefix,
)
from mlxroute.types import Message, Notify, Progress, no_notice, no_progress

BATCH_SIZE: Final = 8
MIN_ANSWERS: Final = 10
_HELD_OUT_STRIDE: Final = 5
_MAX_HELD_OUT: Final = 48
_JUDGED_PER_EPOCH: Final = 2
# Training ends when the held-out loss did not fall so many times in a row.
_PATIENCE: Final = 2
# The memory of a step grows faster than its number of tokens.
_MEMORY_MARGIN: Final = 1.25


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
        epoch: How often each answer was trained on.
        loss: Mean loss of the large model's tokens, in nats.
        accuracy: Share of the questions that the small model answers right.
    """

    epoch: float
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """The settings of one training.

    Args:
        shape: Size of a new adapter.
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
    progress: Progress = no_progress,
    notify: Notify = no_notice,
) -> TuningOutcome:
    """Train LoRA weights of the small model, and keep the best in a folder.

    The model itself has the last weights afterwards. The folder is written as soon as weights are
    better than all before; `provenance` is kept with them. An interrupt or a divergence ends the
    training, and is raised only if no weights were kept until then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _Training(small, held_out, options, folder, provenance, progress).run(trained, notify)


class _Training:
    """One training, with what it is judged by."""

    def __init__(
        self,
        small: SmallModel,
        held_out: Sequence[WorkedAnswer],
        options: TuningOptions,
        folder: Path,
        provenance: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._small = small
        self._options = options
        self._folder = folder
        self._provenance = provenance
        self._progress = progress
        self._config = (
            options.shape.config() if options.start is None else read_adapter_config(options.start)
        )
        self._held_out_answers = held_out
        self._held_out = [
            HeldOutAnswer(
                item.question, item.conversation, decode_answer(small, item.answer.token_ids)
            )
            for item in held_out
        ]
        self._began_s = time.monotonic()
        self._figures: list[HeldOutFigures] = []
        self._best: HeldOutFigures | None = None
        self._ended_by = ""

    def run(self, trained: Sequence[WorkedAnswer], notify: Notify) -> TuningOutcome:
        """Train until the held-out figures or the number of epochs end it."""
        examples = make_examples(self._small, [*trained, *self._held_out_answers])
        prefix_ids: tuple[int, ...] = ()
        if can_share_prefix(self._small.model):
            prefix_ids, examples = split_prefix(examples)
        self._tuning = LoraTuning(
            self._small.model,
            self._options.shape if self._options.start is None else None,
            learning_rate=self._options.learning_rate,
            prefix_ids=prefix_ids,
        )
        size = self._choose_batch_size(examples, len(prefix_ids))
        examples, held_out_examples = examples[: len(trained)], examples[len(trained) :]
        if size < BATCH_SIZE:
            notify(f"little memory is free: each batch of {BATCH_SIZE} is read {size} at a time")
        settings: dict[str, Any] = {
            "answers": {"trained": len(examples), "held_out": len(self._held_out)},
            "read_at_once": size,
        }
        try:
            batches, held_out = make_batches(examples, size), make_batches(held_out_examples, size)
            self._train(batches, held_out, BATCH_SIZE // size, settings)
        except (KeyboardInterrupt, TrainingDiverged) as exc:
            if self._best is None:
                raise
            self._ended_by = "interrupt" if isinstance(exc, KeyboardInterrupt) else "divergence"
        report = self._report(settings)
        if self._best is not None:
            self._write_provenance(report)
        return TuningOutcome(tuple(self._figures), self._best, self._ended_by, report)

    def _train(
        self,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        accumulate: int,
        settings: Mapping[str, Any],
    ) -> None:
        # Whole updates only.
        section = accumulate * max(1, round(len(batches) / accumulate / _JUDGED_PER_EPOCH))
        total = _JUDGED_PER_EPOCH * self._options.epochs * section
        stream = shuffled_batches(batches)
        self._figures.append(self._judge(0.0, held_out))
        steps = itertools.count(1)
        self._progress("training steps", 0, total)
        for done in range(section, total + 1, section):
            with tempfile.TemporaryDirectory() as scratch:
                self._tuning.train(
                    stream,
                    steps=section,
                    accumulate=accumulate,
                    latest=Path(scratch) / WEIGHTS_FILE,
                    on_step=lambda _: self._progress("training steps", next(steps), total),
                )
            figures = self._judge(done / len(batches), held_out)
            if self._add_figures(figures):
                self._write(settings)
            if self._ended_by:
                return
        self._ended_by = "epochs"

    def _judge(self, epoch: float, batches: Sequence[Batch]) -> HeldOutFigures:
        loss = self._tuning.mean_loss(batches)
        accuracy = measure_accuracy(
            self._small, self._held_out, max_tokens=self._options.max_tokens
        )
        return HeldOutFigures(round(epoch, 2), round(loss, 4), round(accuracy, 4))

    def _add_figures(self, figures: HeldOutFigures) -> bool:
        """Return whether weights are the best so far; end the training where they get worse.

        The best have the lowest loss. The training ends when the accuracy falls more than its
        standard error below the highest so far, or when the loss did not fall twice in a row.
        """
        before = self._figures
        highest = max(item.accuracy for item in before)
        lowest = min(before, key=lambda item: item.loss)
        error = standard_error(highest, len(self._held_out))
        self._figures = [*before, figures]
        if figures.accuracy < highest - error:
            self._ended_by = "held-out accuracy"
        elif figures.loss < lowest.loss:
            self._best = figures
            return True
        elif len(before) - before.index(lowest) >= _PATIENCE:
            self._ended_by = "held-out loss"
        return False

    def _report(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._provenance,
            **settings,
            "judged_by": "answers" if judged_by_gold(self._held_out) else "large model",
            "figures": [asdict(figures) for figures in self._figures],
            "kept": None if self._best is None else asdict(self._best),
            "ended_by": self._ended_by,
            "seconds": round(time.monotonic() - self._began_s),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
        }

    def _write(self, settings: Mapping[str, Any]) -> None:
        """Write the folder of the adapter."""
        self._tuning.write_weights(self._folder / WEIGHTS_FILE)
        replace_file(self._folder / CONFIG_FILE, json.dumps(self._config, indent=1).encode())
        self._write_provenance(self._report(settings))

    def _write_provenance(self, report: Mapping[str, Any]) -> None:
        replace_file(self._folder / PROVENANCE_FILE, json.dumps(report, indent=1).encode())

    def _choose_batch_size(self, examples: Sequence[TuningExample], prefix: int) -> int:
        """Return how many answers fit in free memory at a time, at most `BATCH_SIZE`.

        `prefix` is the number of tokens before all examples.

        One step with the shortest example shows how much memory a token takes. Raises
        NotEnoughSpace.
        """
        if self._options.skip_memory_check:
            return BATCH_SIZE
        ordered = sorted(examples, key=lambda example: len(example.token_ids))
        (shortest,) = make_batches(ordered[:1], 1)
        (longest,) = make_batches(ordered[-1:], 1)
        token_bytes = self._tuning.measure_bytes(shortest) / (prefix + shortest[0].size)
        available = available_bytes()
        size = BATCH_SIZE
        while (needed := _MEMORY_MARGIN * token_bytes * (prefix + size * longest[0].size)) > (
            available
        ):
            if size == 1:
                raise NotEnoughSpace(
                    f"training on an answer of {prefix + len(ordered[-1].token_ids)} tokens with"
                    f" its prompt needs some {needed / 2**30:.1f} GiB of memory beside the model,"
                    f" and {available / 2**30:.1f} GiB are free; close programs, choose a smaller"
                    " model or shorter answers, or skip this check",
                    parameter="skip_memory_check",
                )
            size //= 2
        return size


def make_examples(small: SmallModel, answers: Sequence[WorkedAnswer]) -> list[TuningExample]:
    """Return the examples that predict the answers in the small model's vocabulary."""
    return [
        answer_example(small.encode_conversation(item.conversation).ids, item.answer.token_ids)
        for item in answers
    ]
