"""LoRA tuning by `mlx_lm`'s tuner, in sections between which held-out examples are judged."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, make_prompt_cache
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxroute.backend.load import on_cpu
from mlxroute.errors import UsageError
from mlxroute.small.hidden_state import ChosenRows
from mlxroute.training.tensor_files import write_tensors
from mlxroute.training.tuning_examples import Batch

# Larger gradients, which single batches give, make the training diverge.
_MAX_GRADIENT_NORM: Final = 1.0
# Adam's first steps are as long as all others, in directions that few batches decided.
_WARM_UP_UPDATES: Final = 10
_LORA_WEIGHTS: Final = ("lora_a", "lora_b")
_NEVER: Final = 10**9


class TrainingDiverged(UsageError):
    """Raised when the loss is NaN or infinite."""


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The size of an adapter.

    Args:
        rank: Rank of the matrices.
        layers: Number of layers with LoRA weights, the last ones of the model. 12 by default.
        scale: Factor of the product of the two matrices. 20 by default.
    """

    rank: int
    layers: int = 12
    scale: float = 20.0

    def config(self) -> dict[str, Any]:
        """Return the adapter's configuration, as `mlx_lm` reads it."""
        return {
            "fine_tune_type": "lora",
            "num_layers": self.layers,
            "lora_parameters": {"rank": self.rank, "scale": self.scale, "dropout": 0.0},
        }


class LoraTuning:
    """LoRA weights of a model that are trained; all other weights stay as they are.

    Args:
        model: The `mlx_lm` model. It gets LoRA weights, unless it was loaded with some.
        shape: Their size. None for a model that has LoRA weights.
        learning_rate: Highest step size of the optimiser (Adam; Kingma and Ba, 2014).
        prefix_ids: Tokens that precede those of all batches; they are read once for each batch.
            Empty by default. It must be empty for a model where `can_share_prefix` is false.
    """

    def __init__(
        self,
        model: Any,
        shape: LoraShape | None,
        *,
        learning_rate: float,
        prefix_ids: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._prefix_ids = tuple(prefix_ids)
        self._rows = ChosenRows(model)
        self._learning_rate = learning_rate
        self._optimizer = _ClippedAdam(learning_rate=learning_rate)
        model.freeze()
        if shape is None:
            model.apply_to_modules(_unfreeze_lora)
            # Weights of a file are in half precision, where Adam's average of squares becomes 0.
            wide = tree_map(lambda weight: weight.astype(mx.float32), model.trainable_parameters())
            model.update(wide)
        else:
            # The first values are the same in every run.
            mx.random.seed(0)
            parameters = shape.config()["lora_parameters"]
            linear_to_lora_layers(model, min(shape.layers, len(model.layers)), parameters)
        if not tree_flatten(model.trainable_parameters()):
            raise UsageError("the model has no weights that LoRA can adapt")
        mx.eval(model.parameters())

    def schedule(self, updates: int, *, done: int = 0) -> None:
        """Begin a training of a number of updates, of which the first `done` were made before.

        The step size rises to the learning rate in 10 updates, or in a tenth of all if they are
        fewer than 100, and then falls to 0, both linearly. Adam's averages start anew, so after
        `done` updates the step size rises anew too, to where it was.
        """
        warm_up = max(1, min(_WARM_UP_UPDATES, updates // 10))

        def step_size(step: mx.array) -> mx.array:
            # Unsigned integers have no difference below 0.
            number = step.astype(mx.float32)
            rise = mx.minimum((number - done + 1) / warm_up, 1.0)
            fall = mx.minimum((updates - number) / max(1, updates - warm_up), 1.0)
            return self._learning_rate * rise * fall

        self._optimizer = _ClippedAdam(step_size)
        self._optimizer.state["step"] = mx.array(done, mx.uint64)

    def train(
        self,
        batches: Iterator[Batch],
        *,
        steps: int,
        accumulate: int,
        on_step: Callable[[], None],
    ) -> None:
        """Take the next `steps` batches and update the weights after every `accumulate` of them.

        Args:
            batches: Endless batches.
            steps: Number of batches, a multiple of `accumulate`.
            accumulate: Number of batches whose gradients are averaged.
            on_step: Called after each batch.

        Raises TrainingDiverged when the loss of a batch is NaN or infinite.
        """
        arguments = TrainingArgs(
            iters=steps,
            steps_per_report=1,
            steps_per_save=_NEVER,
            grad_accumulation_steps=accumulate,
        )
        with _tuner(), contextlib.suppress(_AllStepsTaken):
            train(
                self._model,
                self._optimizer,
                None,
                args=arguments,
                loss=self._loss,
                iterate_batches=lambda **_: batches,
                training_callback=_StepReports(on_step, steps),
            )
        self._model.eval()

    def mean_loss(self, batches: Sequence[Batch]) -> float:
        """Return the mean loss over all positions to predict, in nats."""
        with _tuner():
            return float(
                evaluate(
                    self._model,
                    None,
                    batch_size=1,
                    num_batches=-1,
                    loss=self._loss,
                    iterate_batches=lambda **_: iter(batches),
                )
            )

    def measure_bytes(self, batch: Batch) -> int:
        """Return the memory that a training step with this batch takes beside the weights."""
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with _tuner():
            mx.eval(nn.value_and_grad(self._model, self._loss)(self._model, *batch))
        peak = mx.get_peak_memory()
        mx.clear_cache()
        return max(0, int(peak - before))

    def write_weights(self, file: Path) -> None:
        """Write the LoRA weights, in half precision; readers get the old file or the new one."""
        weights = {
            name: value.astype(mx.float16)
            for name, value in tree_flatten(self._model.trainable_parameters())
        }
        write_tensors(file, weights, {"format": "mlx"})

    def read_weights(self, file: Path) -> None:
        """Go on with weights that `write_weights` wrote."""
        weights = cast("dict[str, mx.array]", mx.load(str(file)))
        wide = [(name, value.astype(mx.float32)) for name, value in weights.items()]
        self._model.load_weights(wide, strict=False)
        mx.eval(self._model.parameters())

    def _loss(
        self,
        model: Any,
        inputs: mx.array,
        indices: mx.array,
        targets: mx.array,
        probabilities: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """Return the mean cross-entropy of the positions to predict, and their number."""
        cache = self._read_prefix(rows=inputs.shape[0]) if self._prefix_ids else None
        logits = self._rows.logits(inputs, indices, cache=cache).astype(mx.float32)
        logprobs = mx.take_along_axis(logits, targets, axis=-1) - mx.logsumexp(
            logits, axis=-1, keepdims=True
        )
        count = probabilities.sum()
        return -(logprobs * probabilities).sum() / count, count

    def _read_prefix(self, *, rows: int) -> list[ConcatenateKVCache]:
        """Return KV caches of the prefix for a number of rows, through which gradients pass."""
        cache = [ConcatenateKVCache() for _ in self._model.layers]
        self._model(mx.array([self._prefix_ids]), cache=cache)
        for layer in cache:
            layer.state = tuple(
                mx.broadcast_to(part, (rows, *part.shape[1:])) for part in layer.state
            )
        return cache


def can_share_prefix(model: Any) -> bool:
    """Return whether all layers of a model have plain KV caches, which `LoraTuning` can share."""
    return all(type(layer) is KVCache for layer in make_prompt_cache(model))


class _ClippedAdam(optim.Adam):  # type: ignore[misc]
    """Adam with a limit on the norm of the gradients."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        clipped, _ = optim.clip_grad_norm(gradients, _MAX_GRADIENT_NORM)
        return super().apply_gradients(clipped, parameters)


class _AllStepsTaken(Exception):
    """Raised after the last step, because the tuner then writes a file that nobody reads."""


class _StepReports(TrainingCallback):  # type: ignore[misc]
    """Reports each batch, and ends the training after the last one or where it diverges."""

    def __init__(self, on_step: Callable[[], None], steps: int) -> None:
        self._on_step = on_step
        self._steps = steps

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        if not math.isfinite(float(train_info["train_loss"])):
            raise TrainingDiverged(
                "the training diverged: its loss is NaN or infinite; choose a lower learning rate",
                parameter="learning_rate",
            )
        self._on_step()
        if train_info["iteration"] == self._steps:
            raise _AllStepsTaken


@contextlib.contextmanager
def _tuner() -> Iterator[None]:
    """Keep the tuner's own progress off stdout, and from compiling C++ for the CPU.

    A C++ compiler is not everywhere, and takes longer than it saves.
    """
    # A user's variable for it holds before and afterwards too.
    is_switched = on_cpu() and "MLX_DISABLE_COMPILE" not in os.environ
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if is_switched:
            mx.disable_compile()
        try:
            yield
        finally:
            if is_switched:
                mx.enable_compile()


def _unfreeze_lora(name: str, module: Any) -> None:
    if all(key in module for key in _LORA_WEIGHTS):
        module.unfreeze(recurse=False, keys=list(_LORA_WEIGHTS))
