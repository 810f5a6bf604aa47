"""A learned router head: a small perceptron on the final hidden state and the signals."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlxroute.errors import WeightsError
from mlxroute.safe_text import printable_line
from mlxroute.small.kernels.packed_row import HEADER_SIZE, LN_2
from mlxroute.untrusted_text import parse_json

# Entropy (nats), varentropy, the best token's logprob, margin.
SIGNAL_COUNT = 4


@dataclass(frozen=True, slots=True)
class MlpHead:
    """A head of linear layers with ReLU between them; the last one gives the score.

    `layers` are pairs (weight [out, in], bias [out]); the input of the first is the hidden state
    followed by `signal_features`. `quantiles` are the head's scores at evenly spaced ranks, and
    `questions` the fingerprints of the questions it was fitted to, `small` the name of the model
    that it was fitted to; they are empty where the file does not record them. `sha256` is the hash
    of the file, in hexadecimal; empty without one.
    """

    layers: tuple[tuple[mx.array, mx.array], ...]
    quantiles: tuple[float, ...] = ()
    questions: frozenset[str] = frozenset()
    small: str = ""
    sha256: str = ""

    @classmethod
    def load(cls, path: Path, *, hidden_size: int) -> MlpHead:
        """Read `0.weight`, `0.bias`, `1.weight`, ... from a safetensors file.

        Raises WeightsError if they are not the layers of a head for this hidden size.
        """
        try:
            arrays, metadata = mx.load(str(path), return_metadata=True)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, RuntimeError, ValueError) as exc:
            raise WeightsError(f"the head {path} cannot be read: {exc}") from exc
        if not isinstance(arrays, dict) or not isinstance(metadata, dict):
            raise WeightsError(f"the head {path} is not a safetensors file")
        layers = _pop_layers(arrays)
        sizes = [hidden_size + SIGNAL_COUNT, *(weight.shape[0] for weight, _ in layers)]
        shapes = [((out, into), (out,)) for into, out in itertools.pairwise(sizes)]
        if arrays or [(w.shape, b.shape) for w, b in layers] != shapes or sizes[-1] != 1:
            raise WeightsError(
                f"the head {path} does not fit: its layers must lead from {sizes[0]} values"
                f" ({hidden_size} of the hidden state, {SIGNAL_COUNT} signals) to 1"
            )
        try:
            quantiles = tuple(map(float, parse_json(metadata.get("quantiles", "[]"))))
            questions = frozenset(map(str, parse_json(metadata.get("questions", "[]"))))
            small = str(dict(parse_json(metadata.get("report", "{}"))).get("small", ""))
            if not all(map(math.isfinite, quantiles)):
                raise ValueError("a quantile is not finite")
        except (ValueError, TypeError, OverflowError) as exc:
            reason = printable_line(str(exc), limit=120)
            raise WeightsError(f"the head {path} has broken metadata: {reason}") from exc
        # Here, because a lazy array can be evaluated only in the thread that made it.
        mx.eval(layers)
        return cls(tuple(layers), quantiles, questions, small, digest)

    def __call__(self, hidden: mx.array, packed: mx.array) -> mx.array:
        """Return scores [B, 1], lazily, from hidden states [B, D] and packed rows."""
        return self.score(
            mx.concatenate([hidden.astype(mx.float32), signal_features(packed)], axis=-1)
        )

    def score(self, inputs: mx.array) -> mx.array:
        """Return scores [B, 1], lazily, from float32 inputs [B, D + SIGNAL_COUNT]."""
        values = inputs
        for index, (weight, bias) in enumerate(self.layers):
            values = values if index == 0 else mx.maximum(values, 0.0)
            values = values @ weight.T + bias
        return values


def is_head(path: Path) -> bool:
    """Return whether a file holds the layers of a head, of whatever size."""
    try:
        arrays = mx.load(str(path))
    except (OSError, RuntimeError, ValueError):
        return False
    return isinstance(arrays, dict) and bool(_pop_layers(arrays)) and not arrays


def _pop_layers(arrays: dict[str, mx.array]) -> list[tuple[mx.array, mx.array]]:
    """Take the layers out of `arrays`, in order and in float32; a missing bias is empty."""
    layers: list[tuple[mx.array, mx.array]] = []
    for index in itertools.count():
        if f"{index}.weight" not in arrays:
            return layers
        weight = arrays.pop(f"{index}.weight").astype(mx.float32)
        bias = arrays.pop(f"{index}.bias", mx.zeros(0)).astype(mx.float32)
        layers.append((weight, bias))
    return layers


def signal_features(packed: mx.array) -> mx.array:
    """Return the head's inputs from packed rows, [B, SIGNAL_COUNT] in float32.

    The formulas are those of `kernels.packed_row`; the greedy token's logprob is -ln s, and with
    the two largest logits x1 and x2 the margin is (1 - e^(x2 - x1)) / s.
    """
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
