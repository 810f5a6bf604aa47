"""How many examples fit into free memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mlxroute.backend import memory
from mlxroute.errors import NotEnoughSpace
from mlxroute.training.lora_tuning import LoraTuning
from mlxroute.training.tuning_examples import TuningExample, make_batches

# The memory of a step grows faster than its number of tokens.
_MARGIN: Final = 1.25


def choose_batch_size(
    tuning: LoraTuning, examples: Sequence[TuningExample], *, prefix: int, largest: int
) -> int:
    """Return how many of the examples fit in free memory at a time: `largest`, a half of it, ...

    One step with the shortest example shows how much memory a token takes. `prefix` is the number
    of tokens before all examples. Raises NotEnoughSpace if not even one fits.
    """
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    (shortest,) = make_batches(ordered[:1], 1)
    (longest,) = make_batches(ordered[-1:], 1)
    token_bytes = _MARGIN * tuning.measure_bytes(shortest) / (prefix + shortest[0].size)
    available = memory.available_bytes()
    size = largest
    while (needed := token_bytes * (prefix + size * longest[0].size)) > available:
        if size == 1:
            raise NotEnoughSpace(
                f"training on an answer of {prefix + len(ordered[-1].token_ids)} tokens with its"
                f" prompt needs some {needed / 2**30:.1f} GiB of memory beside the model, and"
                f" {available / 2**30:.1f} GiB are free; close programs, choose a smaller model or"
                " shorter answers, or skip this check",
                parameter="skip_memory_check",
            )
        size //= 2
    return size
