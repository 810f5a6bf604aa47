"""Which catalogue models fit this machine's memory."""

from __future__ import annotations

from pathlib import Path

from mlxroute.backend.load import OVERHEAD_BYTES
from mlxroute.catalog import Catalog, Model, Pair
from mlxroute.errors import NotEnoughSpace

# A first try should not begin with a download of half an hour.
_DEMO_DOWNLOAD_BYTES = 6 * 10**9
_DEMO_CPU_PARAMETERS = 2 * 10**9


def measure_machine(cache_dir: Path) -> tuple[bool, int]:
    """Return whether weights are dense here (on a CPU backend), and the free memory in bytes."""
    from mlxroute.backend import blas, memory
    from mlxroute.backend.load import on_cpu

    blas.interpose(cache_dir)
    return on_cpu(), memory.available_bytes()


def resident_bytes(model: Model, *, dense: bool) -> int:
    """Return the memory of a loaded model: float32 weights if `dense`, else as downloaded."""
    if not dense:
        return model.hub_bytes + OVERHEAD_BYTES
    converted = model.index.converted_bytes if model.index else 0
    # Converted weights are half precision; a GGUF may have an untied output layer.
    return max(model.parameters * 4, converted * 2) + OVERHEAD_BYTES


def demo_pairs(catalog: Catalog, *, small: str, available: int, dense: bool) -> list[Pair]:
    """Return the pairs that the demo may use here, the best first.

    Those with the default model `small` come first, then those with the largest large model.
    Raises NotEnoughSpace if the smallest of them needs more than the `available` bytes.
    """

    def needed(pair: Pair) -> int:
        models = (catalog.get_model(pair.small), catalog.get_model(pair.large))
        return sum(resident_bytes(model, dense=dense) for model in models)

    def is_light(pair: Pair) -> bool:
        small, large = catalog.get_model(pair.small), catalog.get_model(pair.large)
        if dense:
            return large.index is not None and large.parameters <= _DEMO_CPU_PARAMETERS
        return small.hub_bytes + large.hub_bytes <= _DEMO_DOWNLOAD_BYTES

    candidates = [pair for pair in catalog.pairs if pair.same_vocabulary and is_light(pair)]
    pairs = [pair for pair in candidates if needed(pair) <= available]
    if not pairs:
        least = min(map(needed, candidates), default=0)
        raise NotEnoughSpace(
            f"the smallest pair for a demo needs {_gibibytes(least)} of memory and"
            f" {_gibibytes(available)} are free; close programs, or use"
            " `mlxroute ask --small NAME --large URL`"
        )

    def rank(pair: Pair) -> tuple[bool, int]:
        return pair.small == small, catalog.get_model(pair.large).parameters

    return sorted(pairs, key=rank, reverse=True)


def default_host_model(catalog: Catalog, *, small: str, available: int, dense: bool) -> Model:
    """Return the model that `host` serves by default, among those that fit and download quickly.

    It is the largest that is paired with the default model `small`, else the largest of all.
    Raises NotEnoughSpace if none fits.
    """

    def is_light(model: Model) -> bool:
        if dense:
            return model.index is not None and model.parameters <= _DEMO_CPU_PARAMETERS
        return model.hub_bytes <= _DEMO_DOWNLOAD_BYTES

    light = [model for model in catalog.models if is_light(model)]
    fitting = [model for model in light if resident_bytes(model, dense=dense) <= available]
    if not fitting:
        least = min(light, key=lambda model: model.parameters)
        check_fits(least, catalog, available=available, dense=dense)
    partners = {pair.large for pair in catalog.pairs if pair.small == small}
    return max(fitting, key=lambda model: (model.name in partners, model.parameters))


def check_fits(model: Model, catalog: Catalog, *, available: int, dense: bool) -> None:
    """Raise NotEnoughSpace, naming a smaller model that would fit, if a model does not fit."""
    needed = resident_bytes(model, dense=dense)
    if needed <= available:
        return
    smaller = [
        other
        for other in catalog.models
        if resident_bytes(other, dense=dense) <= available and other.parameters < model.parameters
    ]
    choice = max(smaller, key=lambda other: other.parameters, default=None)
    hint = f"; {choice.name} would fit" if choice else "; no model of the catalogue is small enough"
    raise NotEnoughSpace(
        f"{model.name} needs {_gibibytes(needed)} of memory and {_gibibytes(available)}"
        f" are free{hint}"
    )


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
