"""A learned head: a small perceptron on the final hidden state and the position's signals."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.errors import WeightsError
from mlxroute.small.kernels.packed_row import HEADER_SIZE, LN_2

if TYPE_CHECKING:
    import mlx.core as mx

# entropy (nats), varentropy, the best logprob, margin
SIGNAL_COUNT = 4


@dataclass(frozen=True, slots=True)
class MlpHead:
    """Layers (weight [out, in], bias [out]) with ReLU between them; the last gives one score.

    The first layer takes the hidden state, then `signal_features`. `quantiles` are its scores at
    evenly spaced ranks, `questions` the fingerprints of those it was fitted to, as far as the file
    tells them.
    """

    layers: tuple[tuple[mx.array, mx.array], ...]
    quantiles: tuple[float, ...] = ()
    questions: frozenset[str] = frozenset()

    @classmethod
    def load(cls, path: Path, *, hidden_size: int) -> MlpHead:
        """Read `0.weight`, `0.bias`, `1.weight`, ... of a safetensors file.

        Raises WeightsError when they are not the layers of a head for this hidden size.
        """
        import mlx.core as mx

        try:
            found, about = mx.load(str(path), return_metadata=True)
        except (OSError, RuntimeError, ValueError) as exc:
            raise WeightsError(f"the head {path} cannot be read: {exc}") from exc
        if not isinstance(found, dict) or not isinstance(about, dict):
            raise WeightsError(f"the head {path} is not a safetensors file")
        layers = []
        for index in itertools.count():
            if f"{index}.weight" not in found:
                break
            weight = found.pop(f"{index}.weight").astype(mx.float32)
            bias = found.pop(f"{index}.bias", mx.zeros(0)).astype(mx.float32)
            layers.append((weight, bias))
        sizes = [hidden_size + SIGNAL_COUNT, *(weight.shape[0] for weight, _ in layers)]
        wanted = [((out, into), (out,)) for into, out in itertools.pairwise(sizes)]
        if found or [(w.shape, b.shape) for w, b in layers] != wanted or sizes[-1] != 1:
            raise WeightsError(
                f"the head {path} does not fit: its layers must lead from {sizes[0]} values"
                f" ({hidden_size} of the hidden state, {SIGNAL_COUNT} signals) to 1"
            )
        try:
            quantiles = tuple(float(value) for value in json.loads(about.get("quantiles", "[]")))
            questions = frozenset(map(str, json.loads(about.get("questions", "[]"))))
        except (ValueError, TypeError) as exc:
            raise WeightsError(f"the head {path} has broken metadata: {exc}") from exc
        return cls(tuple(layers), quantiles, questions)

    def __call__(self, hidden: mx.array, packed: mx.array) -> mx.array:
        """Scores [B, 1] of hidden states [B, D] and packed rows, lazily."""
        import mlx.core as mx

        return self.score(
            mx.concatenate([hidden.astype(mx.float32), signal_features(packed)], axis=-1)
        )

    def score(self, inputs: mx.array) -> mx.array:
        """Scores [B, 1] of inputs [B, D + 4] in float32, lazily."""
        import mlx.core as mx

        values = inputs
        for index, (weight, bias) in enumerate(self.layers):
            values = values if index == 0 else mx.maximum(values, 0.0)
            values = values @ weight.T + bias
        return values


def signal_features(packed: mx.array) -> mx.array:
    """What a head sees of packed rows, [B, 4] in float32."""
    import mlx.core as mx

    s, t, u = (packed[:, i : i + 1] for i in (2, 3, 4))
    k = (packed.shape[1] - HEADER_SIZE) // 2
    log_s = mx.log(s)
    mean = t / s
    entropy = log_s - LN_2 * mean
    varentropy = LN_2 * LN_2 * (u / s - mean * mean)
    gap = (
        packed[:, HEADER_SIZE + k + 1 : HEADER_SIZE + k + 2]
        - packed[:, HEADER_SIZE + k : HEADER_SIZE + k + 1]
    )
    margin = (1.0 - mx.exp(gap)) / s
    return mx.concatenate([entropy, varentropy, -log_s, margin], axis=-1)
