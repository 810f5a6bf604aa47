"""Fitting a head: a perceptron that tells from the small model's state where to escalate.

One hidden layer with ReLU: CITER's router (arXiv 2502.01976) with its last two linear layers folded
into one, and smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

from mlxroute.errors import UsageError
from mlxroute.questions import Question
from mlxroute.small.head import MlpHead
from mlxroute.training.labels import Labelled, Labels
from mlxroute.types import Progress, no_progress

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

RATES: Final = (0.03, 0.05, 0.07, 0.10)
_WIDTH: Final = 64
_HELD_OUT: Final = 5
_FEWEST_ANSWERS: Final = 10
_EPOCHS, _PATIENCE, _BATCH = 200, 10, 256
_RATE, _DECAY = 1e-3, 0.05
_QUANTILES: Final = 64


@dataclass(frozen=True, slots=True)
class Fitted:
    """A head, and what it is worth on answers it was not fitted to."""

    head: MlpHead
    report: Mapping[str, Any]
    quantiles: tuple[float, ...]
    questions: tuple[str, ...]

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


def fit(
    answers: Sequence[Labelled],
    questions: Sequence[Question],
    *,
    labels: Labels,
    about: Mapping[str, Any],
    seed: int = 0,
    progress: Progress = no_progress,
) -> Fitted:
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
    held = _Positions.of([each for index, each in enumerate(pairs) if index % _HELD_OUT == 0])
    seen = _Positions.of([each for index, each in enumerate(pairs) if index % _HELD_OUT])
    if len(set(seen.wanted)) == 1 or not any(held.wanted):
        raise UsageError(
            f"the models' {labels} is nowhere, or everywhere: there is nothing to learn"
        )
    loss = _deferral if labels is Labels.DEFERRAL else _logistic
    if labels is Labels.DEFERRAL and not seen.has_logprobs:
        raise UsageError("deferral needs the large model's logprobs, and its server gives none")
    head = _trained(seen, held, loss, seed=seed, progress=progress)
    scores = _column(head.of(held.inputs)[:, 0])
    report = {
        **about,
        "labels": str(labels),
        "answers": {
            "fitted": sum(1 for index in range(len(pairs)) if index % _HELD_OUT),
            "held_out": sum(1 for index in range(len(pairs)) if index % _HELD_OUT == 0),
        },
        "positions": {"fitted": len(seen.wanted), "held_out": len(held.wanted)},
        **_found(held, {"head": scores}),
    }
    ordered = sorted(scores)
    last = len(ordered) - 1
    quantiles = (ordered[round(step * last / _QUANTILES)] for step in range(_QUANTILES + 1))
    rounded = tuple(round(value, 5) for value in quantiles)
    return Fitted(head, report, rounded, tuple(each.fingerprint for each in questions))


@dataclass(frozen=True, slots=True)
class _Positions:
    """Positions of several answers: `inputs` [N, D + 4], `targets` [N], `logprobs` [N, 2]."""

    inputs: mx.array
    targets: mx.array
    logprobs: mx.array
    differs: list[bool]
    entropies: list[float]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Labelled, Sequence[float]]]) -> Self:
        import mlx.core as mx

        answers = [answer for answer, _ in pairs]
        signals = mx.concatenate([each.signals for each in answers])
        hidden = mx.concatenate([each.hidden for each in answers]).astype(mx.float32)
        differs = mx.concatenate([each.differs for each in answers])
        return cls(
            inputs=mx.concatenate([hidden, signals], axis=1),
            targets=mx.array([value for _, values in pairs for value in values]),
            logprobs=mx.concatenate([each.logprobs for each in answers]),
            differs=[bool(value) for value in _column(differs)],
            entropies=_column(signals[:, 0]),
        )

    @property
    def wanted(self) -> list[bool]:
        """Which positions are to be found."""
        return [bool(value) for value in _column(self.targets)]

    @property
    def has_logprobs(self) -> bool:
        """Whether the large model's logprobs are known everywhere."""
        return all(math.isfinite(value) for value in _column(self.logprobs[:, 1]))


def recall_table(
    answers: Sequence[Labelled],
    targets: Sequence[Sequence[float]],
    head: MlpHead | None = None,
) -> dict[str, Any]:
    """How many positions differ, how many are to be found, and who finds which share of those.

    Random and the oracle (exactly the differing positions, by chance) are expectations.
    """
    positions = _Positions.of(list(zip(answers, targets, strict=True)))
    scores = {} if head is None else {"head": _column(head.of(positions.inputs)[:, 0])}
    return _found(positions, scores)


def _found(positions: _Positions, scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
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


def _column(values: mx.array) -> list[float]:
    return cast("list[float]", values.tolist())


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


def _trained(
    seen: _Positions,
    held: _Positions,
    loss: Callable[[mx.array, mx.array, mx.array], mx.array],
    *,
    seed: int,
    progress: Progress,
) -> MlpHead:
    """AdamW until the held-out loss has not fallen for some epochs."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    x, x_held = seen.inputs, held.inputs
    mean, spread = mx.mean(x, axis=0), mx.sqrt(mx.var(x, axis=0)) + 1e-6
    x, x_held = (x - mean) / spread, (x_held - mean) / spread
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1))
    optimizer = optim.AdamW(learning_rate=_RATE, weight_decay=_DECAY)

    def lost(model: nn.Module, x: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
        return loss(model(x)[:, 0], targets, logprobs)

    step = nn.value_and_grad(model, lost)
    best, best_loss, since = tree_map(mx.array, model.parameters()), math.inf, 0
    for epoch in range(_EPOCHS):
        progress("epochs", epoch, _EPOCHS)
        order = mx.random.permutation(x.shape[0])
        for begin in range(0, x.shape[0], _BATCH):
            rows = order[begin : begin + _BATCH]
            _, gradients = step(model, x[rows], seen.targets[rows], seen.logprobs[rows])
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
        (held_loss,) = _column(lost(model, x_held, held.targets, held.logprobs)[None])
        if held_loss < best_loss:
            best, best_loss, since = tree_map(mx.array, model.parameters()), held_loss, 0
        elif (since := since + 1) >= _PATIENCE:
            break
    first, _, last = best["layers"]
    # The scaling of the inputs becomes part of the first layer.
    weight = first["weight"] / spread
    bias = first["bias"] - weight @ mean
    layers = ((weight, bias), (last["weight"], last["bias"]))
    mx.eval(layers)
    return MlpHead(layers)
