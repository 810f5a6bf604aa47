"""Fitting a head that predicts, from the small model's state, where to escalate."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from mlxroute.catalog.score_ranks import RANK_STEPS
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import Question
from mlxroute.small.mlp_head import MlpHead
from mlxroute.training.head_shapes import (
    COMPONENT_COUNTS,
    Loss,
    Positions,
    fit_linear,
    fit_perceptron,
)
from mlxroute.training.labels import LabelledAnswer
from mlxroute.training.tensor_files import write_tensors
from mlxroute.types import LabelKind

RATES: Final = (0.03, 0.05, 0.07, 0.10)
# One answer in five is held out to judge what was trained on the others.
HELD_OUT_STRIDE: Final = 5
_FOLDS: Final = 4
MIN_ANSWERS: Final = 10
_COMPONENTS_BY_SHAPE: Final = {f"linear, {count} components": count for count in COMPONENT_COUNTS}
_PERCEPTRON: Final = "perceptron"
LabelledPair = tuple[LabelledAnswer, Sequence[float]]
"""An answer with the targets of its positions."""


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head and its report on held-out answers.

    Args:
        head: The head.
        report: What it was fitted to, and its figures.
        quantiles: Its scores at evenly spaced ranks.
        questions: Fingerprints of all questions it was fitted or judged with.
        beats_entropy: Whether its held-out figures are better than those of entropy.
    """

    head: MlpHead
    report: Mapping[str, Any]
    quantiles: tuple[float, ...]
    questions: tuple[str, ...]
    beats_entropy: bool

    def write(self, path: Path) -> None:
        """Write a safetensors file of the weights; report, quantiles and questions are metadata.

        Raises OSError as `write_tensors`.
        """
        arrays = {
            f"{index}.{name}": array
            for index, layer in enumerate(self.head.layers)
            for name, array in zip(("weight", "bias"), layer, strict=True)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "report": json.dumps(self.report),
            "quantiles": json.dumps(self.quantiles),
            "questions": json.dumps(self.questions),
        }
        write_tensors(path, arrays, metadata)


def fit_head(
    answers: Sequence[LabelledAnswer],
    questions: Sequence[Question],
    *,
    labels: LabelKind,
    provenance: Mapping[str, Any],
) -> FittedHead:
    """Fit a head to four fifths of the answers and judge it on the others.

    `questions[i]` is the question of `answers[i]`. For deferral the head learns from logprobs
    instead of labels. `provenance` is added to the report. Raises UsageError for fewer than ten
    answers, for labels without a difference to learn, or for deferral without the large model's
    logprobs.
    """
    if len(answers) < MIN_ANSWERS:
        raise UsageError(
            f"a head needs at least {MIN_ANSWERS} answers, not {len(answers)}; give more questions"
        )
    pairs = [
        (answer, answer.make_targets(question, labels))
        for answer, question in zip(answers, questions, strict=True)
    ]
    if labels is LabelKind.DEFERRAL:
        pairs = _with_logprobs(pairs)
    held_out = Positions.of(pairs[::HELD_OUT_STRIDE])
    fitted_pairs = [pair for index, pair in enumerate(pairs) if index % HELD_OUT_STRIDE]
    fitted = Positions.of(fitted_pairs)
    _check_learnable(fitted, held_out, labels)
    loss = _deferral_loss if labels is LabelKind.DEFERRAL else _logistic_loss
    merits = judge_shapes(fitted_pairs, loss, _mean_recall)
    shape = max(merits, key=lambda name: merits[name])
    head = fit_shape(fitted_pairs, loss, shape)
    scores = held_out.score(head)
    report = {
        **provenance,
        "labels": str(labels),
        "shape": shape,
        "answers": {
            "fitted": len(fitted_pairs),
            "held_out": len(pairs) - len(fitted_pairs),
        },
        "positions": {"fitted": len(fitted.is_target), "held_out": len(held_out.is_target)},
        **_report_recall(held_out, {"head": scores}),
    }
    recalls = report["recall"].values()
    return FittedHead(
        head,
        report,
        quantiles=rank_quantiles(scores),
        questions=tuple(question.fingerprint for question in questions),
        beats_entropy=sum(row["head"] for row in recalls) > sum(row["entropy"] for row in recalls),
    )


def _with_logprobs(
    pairs: list[tuple[LabelledAnswer, list[float]]],
) -> list[tuple[LabelledAnswer, list[float]]]:
    """Return the answers with logprobs; one that was asked for as a whole has none."""
    known = [pair for pair in pairs if pair[0].has_logprobs]
    if len(known) < MIN_ANSWERS:
        raise UsageError(
            "deferral needs the large model's logprobs, and its server gives them for"
            f" {len(known)} of {len(pairs)} answers; choose other labels"
        )
    return known


def _check_learnable(fitted: Positions, held_out: Positions, labels: LabelKind) -> None:
    """Raise UsageError if the labels leave nothing to learn or nothing to judge the head by."""
    if len(set(fitted.is_target)) == 1 or not any(held_out.is_target):
        raise UsageError(
            f"the {labels} labels are all equal, or all 0 on the held-out answers: there is"
            " nothing to learn; give more questions"
        )


def rank_quantiles(scores: Sequence[float]) -> tuple[float, ...]:
    """Return the scores nearest to 65 evenly spaced ranks, rounded."""
    ordered = sorted(scores)
    last = len(ordered) - 1
    indices = (round(step * last / RANK_STEPS) for step in range(RANK_STEPS + 1))
    return tuple(round(ordered[index], 5) for index in indices)


def recall_table(
    answers: Sequence[LabelledAnswer],
    targets: Sequence[Sequence[float]],
    head: MlpHead | None = None,
) -> dict[str, Any]:
    """Return the shares of differing and of target positions, and each score's recall of targets.

    `random` and `oracle` (random among the differing positions) are expected values.
    """
    positions = Positions.of(list(zip(answers, targets, strict=True)))
    scores = {} if head is None else {"head": positions.score(head)}
    return _report_recall(positions, scores)


def _report_recall(positions: Positions, scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    is_target = positions.is_target
    differing = _share(positions.differs)
    return {
        "differing": round(differing, 4),
        "to_find": round(_share(is_target), 4),
        "recall": {
            f"{rate:g}": {
                **{name: recall(values, is_target, rate) for name, values in scores.items()},
                "entropy": recall(positions.entropies, is_target, rate),
                "random": rate,
                "oracle": round(min(1.0, rate / max(differing, 1e-9)), 4),
            }
            for rate in RATES
        },
    }


def recall(scores: Sequence[float], is_target: Sequence[bool], rate: float) -> float:
    """Return the share of target positions among the `rate` of all with the highest scores."""
    count = round(rate * len(scores))
    highest = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return round(sum(is_target[i] for i in highest) / max(1, sum(is_target)), 4)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def judge_shapes(
    pairs: Sequence[LabelledPair], loss: Loss, merit: Callable[[Positions, Sequence[float]], float]
) -> dict[str, float]:
    """Return the mean merit of each shape in 4-fold cross-validation over the answers, by its name.

    `merit` judges the scores of positions that the head was not fitted to.
    """
    merits: dict[str, list[float]] = {}
    for fold in range(_FOLDS):
        validation = Positions.of(pairs[fold::_FOLDS])
        training = [pair for index, pair in enumerate(pairs) if index % _FOLDS != fold]
        for shape, head in _fit_shapes(training, loss).items():
            merits.setdefault(shape, []).append(merit(validation, validation.score(head)))
    return {shape: statistics.mean(values) for shape, values in merits.items()}


def _fit_shapes(pairs: Sequence[LabelledPair], loss: Loss) -> dict[str, MlpHead]:
    """Fit a head of each shape, by its name."""
    heads = fit_linear(Positions.of(pairs), loss, COMPONENT_COUNTS)
    perceptron = _fit_perceptron(pairs, loss)
    return dict(zip(_COMPONENTS_BY_SHAPE, heads, strict=True)) | {_PERCEPTRON: perceptron}


def fit_shape(pairs: Sequence[LabelledPair], loss: Loss, shape: str) -> MlpHead:
    """Fit a head of a shape."""
    if shape == _PERCEPTRON:
        return _fit_perceptron(pairs, loss)
    (head,) = fit_linear(Positions.of(pairs), loss, [_COMPONENTS_BY_SHAPE[shape]])
    return head


def _fit_perceptron(pairs: Sequence[LabelledPair], loss: Loss) -> MlpHead:
    """Fit a perceptron; one answer in four decides when to stop."""
    training = Positions.of([pair for index, pair in enumerate(pairs) if index % _FOLDS])
    return fit_perceptron(training, Positions.of(pairs[::_FOLDS]), loss)


def _mean_recall(positions: Positions, scores: Sequence[float]) -> float:
    return statistics.mean(recall(scores, positions.is_target, rate) for rate in RATES)


def _logistic_loss(logits: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
    """Return the logistic losses (binary cross-entropy; Cox, 1958) of logits [..., B]."""
    return mx.logaddexp(0.0, logits) - logits * targets


def _deferral_loss(logits: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
    """Return -log(sigmoid(-z) P_small + sigmoid(z) P_large) of logits z [..., B].

    The marginal likelihood of Co-LLM (arXiv 2403.03870), with e^z / (1 + e^z) for sigmoid(z).
    """
    mixed = mx.logaddexp(logprobs[:, 0], logits + logprobs[:, 1])
    return mx.logaddexp(0.0, logits) - mixed
