"""Fitting a head: a perceptron that tells from the small model's state where the large one differs.

One hidden layer with ReLU: CITER's router (arXiv 2502.01976) with its last two linear layers folded
into one, and smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from mlxroute.errors import UsageError
from mlxroute.small.head import MlpHead
from mlxroute.training.labels import Labelled
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

    def write(self, path: Path) -> None:
        """Write weights and provenance to a safetensors file."""
        import mlx.core as mx

        arrays = {
            f"{index}.{name}": array
            for index, layer in enumerate(self.head.layers)
            for name, array in zip(("weight", "bias"), layer, strict=True)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"report": json.dumps(self.report), "quantiles": json.dumps(self.quantiles)}
        mx.save_safetensors(str(path), arrays, about)


def fit(
    answers: Sequence[Labelled],
    *,
    about: Mapping[str, Any],
    seed: int = 0,
    progress: Progress = no_progress,
) -> Fitted:
    """Fit a head to four fifths of the answers, and judge it on the others.

    `about` is what the report says of where they come from. Raises UsageError for too few answers,
    or where the models nowhere differ.
    """
    import mlx.core as mx

    if len(answers) < _FEWEST_ANSWERS:
        raise UsageError(
            f"a head needs at least {_FEWEST_ANSWERS} answers, not {len(answers)};"
            " give more questions"
        )
    held = [each for index, each in enumerate(answers) if index % _HELD_OUT == 0]
    seen = [each for index, each in enumerate(answers) if index % _HELD_OUT]
    x, y = _inputs(seen), _labels(seen)
    x_held, y_held = _inputs(held), _labels(held)
    labels = [bool(value) for value in _column_of(y_held)]
    if len(set(_column_of(y))) == 1 or not any(labels):
        raise UsageError("the models differ nowhere, or everywhere: there is nothing to learn")
    head = _trained(x, y, x_held, y_held, seed=seed, progress=progress)
    scores = _scores(head, x_held)
    entropies = _column_of(mx.concatenate([each.signals[:, 0] for each in held]))
    base = sum(labels) / len(labels)
    report = {
        **about,
        "answers": {"fitted": len(seen), "held_out": len(held)},
        "positions": {"fitted": int(y.size), "held_out": len(labels)},
        "differing": round(base, 4),
        "recall": {
            f"{rate:g}": {
                "head": recall(scores, labels, rate),
                "entropy": recall(entropies, labels, rate),
                "random": rate,
                "oracle": round(min(1.0, rate / base), 4),
            }
            for rate in RATES
        },
    }
    ordered = sorted(scores)
    last = len(ordered) - 1
    quantiles = (ordered[round(step * last / _QUANTILES)] for step in range(_QUANTILES + 1))
    return Fitted(head, report, tuple(round(value, 5) for value in quantiles))


def recall(scores: Sequence[float], labels: Sequence[bool], rate: float) -> float:
    """Which share of the differing positions is among this share of all with the highest scores."""
    count = round(rate * len(scores))
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return round(sum(labels[i] for i in best) / max(1, sum(labels)), 4)


def _inputs(answers: Sequence[Labelled]) -> mx.array:
    import mlx.core as mx

    rows = [mx.concatenate([a.hidden.astype(mx.float32), a.signals], axis=1) for a in answers]
    return mx.concatenate(rows)


def _labels(answers: Sequence[Labelled]) -> mx.array:
    import mlx.core as mx

    return mx.concatenate([each.differs for each in answers])


def _column_of(values: mx.array) -> list[float]:
    return cast("list[float]", values.tolist())


def _scores(head: MlpHead, x: mx.array) -> list[float]:
    return _column_of(head.of(x)[:, 0])


def _trained(
    x: mx.array,
    y: mx.array,
    x_held: mx.array,
    y_held: mx.array,
    *,
    seed: int,
    progress: Progress,
) -> MlpHead:
    """AdamW on the logistic loss until the held-out loss has not fallen for some epochs."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    mean, spread = mx.mean(x, axis=0), mx.sqrt(mx.var(x, axis=0)) + 1e-6
    x, x_held = (x - mean) / spread, (x_held - mean) / spread
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1))
    optimizer = optim.AdamW(learning_rate=_RATE, weight_decay=_DECAY)

    def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        logits: mx.array = model(x)[:, 0]
        found: mx.array = nn.losses.binary_cross_entropy(logits, y, with_logits=True)
        return found

    step = nn.value_and_grad(model, loss)
    best, best_loss, since = tree_map(mx.array, model.parameters()), math.inf, 0
    for epoch in range(_EPOCHS):
        progress("epochs", epoch, _EPOCHS)
        order = mx.random.permutation(x.shape[0])
        for begin in range(0, x.shape[0], _BATCH):
            rows = order[begin : begin + _BATCH]
            _, gradients = step(model, x[rows], y[rows])
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
        (held_loss,) = _column_of(loss(model, x_held, y_held)[None])
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
