"""The shapes a head can have, each fitted by gradient descent.

A linear head takes the signals and the leading principal components of the hidden state; it needs
few answers. A perceptron has one hidden layer: the router of CITER (arXiv 2502.01976), smaller and
with its last two linear layers merged into one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlxroute.small.mlp_head import SIGNAL_COUNT, MlpHead
from mlxroute.training.labels import LabelledAnswer, to_list

COMPONENT_COUNTS: Final = (8, 16, 32, 64, 128)
_SEED: Final = 0

# The linear head: Adam steps on all positions at once, and the penalty on its weights.
_STEPS: Final = 300
_LINEAR_LEARNING_RATE: Final = 0.05
_LINEAR_BETAS: Final = (0.9, 0.99)
_RIDGE: Final = 5.0

# The perceptron: units of the hidden layer, epochs, and epochs without progress before it stops.
_HIDDEN_UNITS: Final = 64
_EPOCHS: Final = 60
_PATIENCE: Final = 6
_BATCH_SIZE: Final = 256
_LEARNING_RATE: Final = 1e-3
_WEIGHT_DECAY: Final = 0.05

Loss = Callable[[mx.array, mx.array, mx.array], mx.array]
"""The losses of logits [..., B], given targets [B] and logprobs [B, 2]."""


@dataclass(frozen=True, slots=True)
class Positions:
    """The N positions of several answers, as training data.

    Args:
        inputs: The inputs of a head, [N, D + 4].
        targets: 1 where a head should escalate, else 0, [N].
        logprobs: Those of the small and the large model, in nats, [N, 2].
        differs: Whether the models disagree, for each position.
        entropies: Those of the small model, in nats.
    """

    inputs: mx.array
    targets: mx.array
    logprobs: mx.array
    differs: list[bool]
    entropies: list[float]

    @classmethod
    def of(cls, pairs: Sequence[tuple[LabelledAnswer, Sequence[float]]]) -> Self:
        """Return the positions of answers, each paired with its targets."""
        answers = [answer for answer, _ in pairs]
        features = mx.concatenate([answer.features for answer in answers])
        hidden = mx.concatenate([answer.hidden for answer in answers]).astype(mx.float32)
        differs = mx.concatenate([answer.differs for answer in answers])
        return cls(
            inputs=mx.concatenate([hidden, features], axis=1),
            targets=mx.array([value for _, values in pairs for value in values]),
            logprobs=mx.concatenate([answer.logprobs for answer in answers]),
            differs=[bool(value) for value in to_list(differs)],
            entropies=to_list(features[:, 0]),
        )

    @property
    def is_target(self) -> list[bool]:
        """Whether a head should escalate, for each position."""
        return [bool(value) for value in to_list(self.targets)]

    def score(self, head: MlpHead) -> list[float]:
        """Return the head's score of each position."""
        return to_list(head.score(self.inputs)[:, 0])


def fit_linear(positions: Positions, loss: Loss, counts: Sequence[int]) -> list[MlpHead]:
    """Fit a head of one layer for each of several counts of principal components.

    Each head takes that many components and the signals. Minimizes `loss` with a ridge penalty by
    Adam (arXiv 1412.6980), the learning rate falling linearly to 0.
    """
    mean, scale = _standardization(positions.inputs)
    standardized = (positions.inputs - mean) / scale
    basis = _principal_components(standardized, max(counts))
    features = mx.concatenate([standardized @ basis, mx.ones((standardized.shape[0], 1))], axis=1).T
    # The heads learn at once, each with a row of weights: 0 for the components that it leaves out.
    # The last weight is the bias, which has no penalty.
    columns = mx.arange(features.shape[0])
    is_used = mx.stack([columns >= basis.shape[1] - SIGNAL_COUNT - count for count in counts])
    ridge = _RIDGE / (2 * features.shape[1]) * (columns < basis.shape[1])

    def penalized_loss(parameters: dict[str, mx.array]) -> mx.array:
        weights = parameters["weights"] * is_used
        losses = loss(weights @ features, positions.targets, positions.logprobs)
        return mx.sum(mx.mean(losses, axis=1)) + mx.sum(ridge * weights * weights)

    parameters = {"weights": mx.zeros(is_used.shape)}
    optimizer = optim.Adam(
        optim.linear_schedule(_LINEAR_LEARNING_RATE, 0.0, _STEPS),
        betas=list(_LINEAR_BETAS),
        bias_correction=True,
    )
    gradient = mx.grad(penalized_loss)
    for _ in range(_STEPS):
        parameters = optimizer.apply_gradients(gradient(parameters), parameters)
        mx.eval(parameters, optimizer.state)
    # Projection and standardization become part of the layers.
    weights = (parameters["weights"][:, :-1] @ basis.T) / scale
    biases = parameters["weights"][:, -1] - weights @ mean
    layers = [(weights[i : i + 1], biases[i : i + 1]) for i in range(len(counts))]
    mx.eval(layers)
    return [MlpHead((layer,)) for layer in layers]


def _principal_components(inputs: mx.array, components: int) -> mx.array:
    """Return a basis [D + 4, components + 4] of standardized inputs.

    Its columns are the hidden state's leading principal components, scaled to unit variance and
    the leading ones last, and the signals as they are.
    """
    hidden = inputs[:, :-SIGNAL_COUNT]
    # `eigh` runs on the CPU only; eigenvalues rise.
    variances, directions = mx.linalg.eigh(hidden.T @ hidden / hidden.shape[0], stream=mx.cpu)
    variances, directions = variances[-components:], directions[:, -components:]
    directions = directions / mx.sqrt(mx.maximum(variances, 1e-6))
    below = mx.zeros((SIGNAL_COUNT, directions.shape[1]))
    right = mx.concatenate([mx.zeros((hidden.shape[1], SIGNAL_COUNT)), mx.eye(SIGNAL_COUNT)])
    return mx.concatenate([mx.concatenate([directions, below]), right], axis=1)


def fit_perceptron(positions: Positions, validation: Positions, loss: Loss) -> MlpHead:
    """Fit a head with one hidden layer by AdamW (arXiv 1711.05101), with early stopping.

    Stops after six epochs without a lower loss on `validation`, and returns the head with the
    lowest one.
    """
    mean, scale = _standardization(positions.inputs)
    x, x_validation = (positions.inputs - mean) / scale, (validation.inputs - mean) / scale
    mx.random.seed(_SEED)
    model = nn.Sequential(
        nn.Linear(x.shape[1], _HIDDEN_UNITS), nn.ReLU(), nn.Linear(_HIDDEN_UNITS, 1)
    )
    optimizer = optim.AdamW(learning_rate=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)

    def model_loss(
        model: nn.Module, x: mx.array, targets: mx.array, logprobs: mx.array
    ) -> mx.array:
        return mx.mean(loss(model(x)[:, 0], targets, logprobs))

    gradient = nn.value_and_grad(model, model_loss)
    best, best_loss, stale_epochs = tree_map(mx.array, model.parameters()), math.inf, 0
    for _ in range(_EPOCHS):
        order = mx.random.permutation(x.shape[0])
        for begin in range(0, x.shape[0], _BATCH_SIZE):
            rows = order[begin : begin + _BATCH_SIZE]
            _, gradients = gradient(
                model, x[rows], positions.targets[rows], positions.logprobs[rows]
            )
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
        (validation_loss,) = to_list(
            model_loss(model, x_validation, validation.targets, validation.logprobs)[None]
        )
        if validation_loss < best_loss:
            best, best_loss, stale_epochs = (
                tree_map(mx.array, model.parameters()),
                validation_loss,
                0,
            )
        elif (stale_epochs := stale_epochs + 1) >= _PATIENCE:
            break
    return _merge_standardization(best["layers"], mean, scale)


def _merge_standardization(layers: Sequence[Any], mean: mx.array, scale: mx.array) -> MlpHead:
    """Return a head for raw inputs from the parameters of a perceptron for standardized ones."""
    first, _, last = layers
    weight = first["weight"] / scale
    merged = ((weight, first["bias"] - weight @ mean), (last["weight"], last["bias"]))
    mx.eval(merged)
    return MlpHead(merged)


def _standardization(inputs: mx.array) -> tuple[mx.array, mx.array]:
    """Return each input's mean and standard deviation, the latter above 0."""
    return mx.mean(inputs, axis=0), mx.sqrt(mx.var(inputs, axis=0)) + 1e-6
