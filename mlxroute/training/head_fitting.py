"""Fitting a head: what tells from the small model's state where to escalate."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlxroute.errors import UsageError
from mlxroute.questions.question_files import Question
from mlxroute.small.mlp_head import MlpHead
from mlxroute.training.head_shapes import COMPONENTS, Loss, Positions, linear, perceptron
from mlxroute.training.labels import LabelledAnswer
from mlxroute.types import LabelKind

if TYPE_CHECKING:
    import mlx.core as mx

RATES: Final = (0.03, 0.05, 0.07, 0.10)
_HELD_OUT: Final = 5
_FOLDS: Final = 4
_FEWEST_ANSWERS: Final = 10
_QUANTILES: Final = 64
_PERCEPTRON: Final = "perceptron"
_Pair = tuple[LabelledAnswer, Sequence[float]]


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head, and what it is worth on answers it was not fitted to."""

    head: MlpHead
    report: Mapping[str, Any]
    quantiles: tuple[float, ...]
    questions: tuple[str, ...]

    @property
    def beats_entropy(self) -> bool:
        """Whether it finds more of the held-out positions, over all rates, than entropy does."""
        rows = self.report["recall"].values()
        return bool(sum(row["head"] for row in rows) > sum(row["entropy"] for row in rows))

    def write(self, path: Path) -> None:
        """Write weights and provenance to a safetensors file."""
        import mlx.core as mx

        arrays = {
            f"{index}.{name}": array
            for index, layer in enumerate(self.head.layers)
            for name, array in zip(("weight", "bias"), layer, strict=True)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "report": json.dumps(self.report),
            "quantiles": json.dumps(self.quantiles),
            "questions": json.dumps(self.questions),
        }
        mx.save_safetensors(str(path), arrays, about)


def fit_head(
    answers: Sequence[LabelledAnswer],
    questions: Sequence[Question],
    *,
    labels: LabelKind,
    about: Mapping[str, Any],
) -> FittedHead:
    """Fit a head to four fifths of the answers, and judge it on the others.

    `questions` are those that the answers are to. A head for deferral learns from logprobs instead
    of labels. `about` is what the report says of where the answers come from. Raises UsageError for
    too few answers, or where there is nothing to learn.
    """
    if len(answers) < _FEWEST_ANSWERS:
        raise UsageError(
            f"a head needs at least {_FEWEST_ANSWERS} answers, not {len(answers)};"
            " give more questions"
        )
    targets = [a.targets(q, labels) for a, q in zip(answers, questions, strict=True)]
    pairs = list(zip(answers, targets, strict=True))
    held = Positions.of(pairs[::_HELD_OUT])
    rest = [each for index, each in enumerate(pairs) if index % _HELD_OUT]
    seen = Positions.of(rest)
    if len(set(seen.wanted)) == 1 or not any(held.wanted):
        raise UsageError(
            f"the models' {labels} is nowhere, or everywhere: there is nothing to learn"
        )
    loss = _deferral if labels is LabelKind.DEFERRAL else _logistic
    if labels is LabelKind.DEFERRAL and not seen.has_logprobs:
        raise UsageError("deferral needs the large model's logprobs, and its server gives none")
    head, shape = _chosen(rest, loss)
    scores = held.scores(head)
    report = {
        **about,
        "labels": str(labels),
        "shape": shape,
        "answers": {
            "fitted": len(rest),
            "held_out": len(pairs) - len(rest),
        },
        "positions": {"fitted": len(seen.wanted), "held_out": len(held.wanted)},
        **_found(held, {"head": scores}),
    }
    ordered = sorted(scores)
    last = len(ordered) - 1
    quantiles = (ordered[round(step * last / _QUANTILES)] for step in range(_QUANTILES + 1))
    rounded = tuple(round(value, 5) for value in quantiles)
    return FittedHead(head, report, rounded, tuple(each.fingerprint for each in questions))


def recall_table(
    answers: Sequence[LabelledAnswer],
    targets: Sequence[Sequence[float]],
    head: MlpHead | None = None,
) -> dict[str, Any]:
    """How many positions differ, how many are to be found, and who finds which share of those.

    Random and the oracle (exactly the differing positions, by chance) are expectations.
    """
    positions = Positions.of(list(zip(answers, targets, strict=True)))
    scores = {} if head is None else {"head": positions.scores(head)}
    return _found(positions, scores)


def _found(positions: Positions, scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    wanted, differing = positions.wanted, _share(positions.differs)
    return {
        "differing": round(differing, 4),
        "to_find": round(_share(wanted), 4),
        "recall": {
            f"{rate:g}": {
                **{name: recall(each, wanted, rate) for name, each in scores.items()},
                "entropy": recall(positions.entropies, wanted, rate),
                "random": rate,
                "oracle": round(min(1.0, rate / max(differing, 1e-9)), 4),
            }
            for rate in RATES
        },
    }


def recall(scores: Sequence[float], labels: Sequence[bool], rate: float) -> float:
    """Which share of the positions to find is among this share of all with the highest scores."""
    count = round(rate * len(scores))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return round(sum(labels[i] for i in best) / max(1, sum(labels)), 4)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _chosen(pairs: Sequence[_Pair], loss: Loss) -> tuple[MlpHead, str]:
    """The head of the shape that finds most in answers left out in turn, fitted to all of these."""
    found: dict[str, list[float]] = {}
    for fold in range(_FOLDS):
        left = Positions.of(pairs[fold::_FOLDS])
        others = [each for i, each in enumerate(pairs) if i % _FOLDS != fold]
        seen = Positions.of(others)
        heads = {_named(count): linear(seen, loss, count) for count in COMPONENTS}
        heads[_PERCEPTRON] = _perceptron(others, loss)
        for name, head in heads.items():
            scores = left.scores(head)
            found.setdefault(name, []).append(
                statistics.mean(recall(scores, left.wanted, rate) for rate in RATES)
            )
    best = max(found, key=lambda name: statistics.mean(found[name]))
    if best == _PERCEPTRON:
        return _perceptron(pairs, loss), best
    counts = {_named(count): count for count in COMPONENTS}
    return linear(Positions.of(pairs), loss, counts[best]), best


def _perceptron(pairs: Sequence[_Pair], loss: Loss) -> MlpHead:
    """Fitted to three quarters, until it no longer learns anything of the rest."""
    rest = [each for i, each in enumerate(pairs) if i % _FOLDS]
    return perceptron(Positions.of(rest), Positions.of(pairs[::_FOLDS]), loss)


def _named(components: int) -> str:
    return f"linear, {components} components"


def _logistic(logits: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
    """Mean logistic loss of logits [B]."""
    import mlx.nn as nn

    found: mx.array = nn.losses.binary_cross_entropy(logits, targets, with_logits=True)
    return found


def _deferral(logits: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
    """Mean -log of sigmoid(-z) P_small + sigmoid(z) P_large (Co-LLM, arXiv 2403.03870)."""
    import mlx.core as mx
    import mlx.nn as nn

    keeps, defers = nn.log_sigmoid(-logits), nn.log_sigmoid(logits)
    return -mx.mean(mx.logaddexp(keeps + logprobs[:, 0], defers + logprobs[:, 1]))
