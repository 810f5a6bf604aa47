"""The shapes a head can have, each fitted by gradients.

Linear in the signals and in the leading principal components of the state: few answers suffice for
it. A perceptron with one hidden layer: CITER's router (arXiv 2502.01976) with its last two linear
layers folded into one, and smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, cast

from mlxroute.small.mlp_head import SIGNAL_COUNT, MlpHead
from mlxroute.training.labels import LabelledAnswer

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

COMPONENTS: Final = (8, 16, 32, 64, 128)
_WIDTH: Final = 64
_SEED: Final = 0
_EPOCHS, _PATIENCE, _BATCH = 60, 6, 256
_RATE, _DECAY = 1e-3, 0.05
# Of the linear one: steps on all positions at once, and the penalty on its weights.
_STEPS, _STEP_RATE, _RIDGE = 300, 0.05, 5.0

Loss = Callable[["mx.array", "mx.array", "mx.array"], "mx.array"]
"""Mean loss of logits [B], with targets [B] and logprobs [B, 2]."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions of several answers: `inputs` [N, D + 4], `targets` [N], `logprobs` [N, 2]."""

    inputs: mx.array
    targets: mx.array
    logprobs: mx.array
    differs: list[bool]
    entropies: list[float]

    @classmethod
    def of(cls, pairs: Sequence[tuple[LabelledAnswer, Sequence[float]]]) -> Self:
        """Those of answers with their targets."""
        import mlx.core as mx

        answers = [answer for answer, _ in pairs]
        signals = mx.concatenate([each.signals for each in answers])
        hidden = mx.concatenate([each.hidden for each in answers]).astype(mx.float32)
        differs = mx.concatenate([each.differs for each in answers])
        return cls(
            inputs=mx.concatenate([hidden, signals], axis=1),
            targets=mx.array([value for _, values in pairs for value in values]),
            logprobs=mx.concatenate([each.logprobs for each in answers]),
            differs=[bool(value) for value in column(differs)],
            entropies=column(signals[:, 0]),
        )

    @property
    def wanted(self) -> list[bool]:
        """Which positions are to be found."""
        return [bool(value) for value in column(self.targets)]

    @property
    def has_logprobs(self) -> bool:
        """Whether the large model's logprobs are known everywhere."""
        return all(math.isfinite(value) for value in column(self.logprobs[:, 1]))

    def scores(self, head: MlpHead) -> list[float]:
        """What a head says of them."""
        return column(head.score(self.inputs)[:, 0])


def linear(seen: Positions, loss: Loss, components: int) -> MlpHead:
    """A head of one layer, on so many principal components and the signals."""
    import mlx.core as mx

    mean, spread = _scale(seen.inputs)
    basis = _basis((seen.inputs - mean) / spread, components)
    features = ((seen.inputs - mean) / spread) @ basis
    count = features.shape[0]

    def lost(weights: mx.array, bias: mx.array) -> mx.array:
        ridge = _RIDGE / (2 * count) * mx.sum(weights * weights)
        return loss(features @ weights + bias, seen.targets, seen.logprobs) + ridge

    weights, bias = mx.zeros(basis.shape[1]), mx.zeros(1)
    step = mx.value_and_grad(lost, argnums=(0, 1))
    moments = [(mx.zeros_like(each), mx.zeros_like(each)) for each in (weights, bias)]
    for number in range(1, _STEPS + 1):
        _, gradients = step(weights, bias)
        (weights, bias), moments = _adam((weights, bias), gradients, moments, number)
        mx.eval(weights, bias, *(part for pair in moments for part in pair))
    # The projection and the scaling of the inputs become part of the layer.
    weight = ((basis @ weights) / spread)[None]
    layer = (weight, bias - weight @ mean)
    mx.eval(layer)
    return MlpHead((layer,))


def _adam(
    values: tuple[mx.array, mx.array],
    gradients: tuple[mx.array, mx.array],
    moments: Sequence[tuple[mx.array, mx.array]],
    number: int,
) -> tuple[tuple[mx.array, mx.array], list[tuple[mx.array, mx.array]]]:
    """One step of Adam (arXiv 1412.6980), the step size falling to 0."""
    import mlx.core as mx

    rate = _STEP_RATE * (1 - (number - 1) / _STEPS)
    found, kept = [], []
    for value, gradient, (first, second) in zip(values, gradients, moments, strict=True):
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient * gradient
        size = mx.sqrt(second / (1 - 0.99**number)) + 1e-8
        found.append(value - rate * (first / (1 - 0.9**number)) / size)
        kept.append((first, second))
    return (found[0], found[1]), kept


def _basis(inputs: mx.array, components: int) -> mx.array:
    """[D + 4, components + 4]: the state's leading directions at unit variance, and the signals."""
    import mlx.core as mx

    hidden = inputs[:, :-SIGNAL_COUNT]
    spread, directions = mx.linalg.eigh(hidden.T @ hidden / hidden.shape[0], stream=mx.cpu)
    spread, directions = spread[-components:], directions[:, -components:]
    directions = directions / mx.sqrt(mx.maximum(spread, 1e-6))
    corner = mx.zeros((SIGNAL_COUNT, directions.shape[1]))
    right = mx.concatenate([mx.zeros((hidden.shape[1], SIGNAL_COUNT)), mx.eye(SIGNAL_COUNT)])
    return mx.concatenate([mx.concatenate([directions, corner]), right], axis=1)


def perceptron(seen: Positions, checked: Positions, loss: Loss) -> MlpHead:
    """AdamW until the loss on `checked` has not fallen for some epochs."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    mean, spread = _scale(seen.inputs)
    x, x_checked = (seen.inputs - mean) / spread, (checked.inputs - mean) / spread
    mx.random.seed(_SEED)
    model = nn.Sequential(nn.Linear(x.shape[1], _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 1))
    optimizer = optim.AdamW(learning_rate=_RATE, weight_decay=_DECAY)

    def lost(model: nn.Module, x: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
        return loss(model(x)[:, 0], targets, logprobs)

    step = nn.value_and_grad(model, lost)
    best, best_loss, since = tree_map(mx.array, model.parameters()), math.inf, 0
    for _ in range(_EPOCHS):
        order = mx.random.permutation(x.shape[0])
        for begin in range(0, x.shape[0], _BATCH):
            rows = order[begin : begin + _BATCH]
            _, gradients = step(model, x[rows], seen.targets[rows], seen.logprobs[rows])
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
        (found,) = column(lost(model, x_checked, checked.targets, checked.logprobs)[None])
        if found < best_loss:
            best, best_loss, since = tree_map(mx.array, model.parameters()), found, 0
        elif (since := since + 1) >= _PATIENCE:
            break
    first, _, last = best["layers"]
    # The scaling of the inputs becomes part of the first layer.
    weight = first["weight"] / spread
    layers = ((weight, first["bias"] - weight @ mean), (last["weight"], last["bias"]))
    mx.eval(layers)
    return MlpHead(layers)


def _scale(inputs: mx.array) -> tuple[mx.array, mx.array]:
    import mlx.core as mx

    return mx.mean(inputs, axis=0), mx.sqrt(mx.var(inputs, axis=0)) + 1e-6


def column(values: mx.array) -> list[float]:
    """The values of an array [N]."""
    return cast("list[float]", values.tolist())
