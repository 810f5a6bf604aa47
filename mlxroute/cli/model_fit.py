"""Which catalogue models fit this machine."""

from __future__ import annotations

from mlxroute.backend.load import OVERHEAD_BYTES
from mlxroute.catalog import Catalog, Model, Pair
from mlxroute.errors import NotEnoughSpace

# A first look should not start with a download of half an hour.
_DEMO_DOWNLOAD_BYTES = 6 * 10**9
_DEMO_CPU_PARAMETERS = 2 * 10**9


def resident_bytes(model: Model, *, dense: bool) -> int:
    """Memory a loaded model takes: dense float32 on a CPU backend, as downloaded elsewhere."""
    if not dense:
        return model.hub_bytes + OVERHEAD_BYTES
    converted = model.index.converted_bytes if model.index else 0
    # Converted weights are half precision; a GGUF may carry an untied output layer.
    return max(model.parameters * 4, converted * 2) + OVERHEAD_BYTES


def demo_pairs(catalog: Catalog, *, available: int, dense: bool) -> list[Pair]:
    """Pairs the demo may use here, best first: the largest large model that is not a burden."""

    def needed(pair: Pair) -> int:
        models = (catalog.get_model(pair.small), catalog.get_model(pair.large))
        return sum(resident_bytes(model, dense=dense) for model in models)

    def light(pair: Pair) -> bool:
        small, large = catalog.get_model(pair.small), catalog.get_model(pair.large)
        if dense:
            return large.index is not None and large.parameters <= _DEMO_CPU_PARAMETERS
        return small.hub_bytes + large.hub_bytes <= _DEMO_DOWNLOAD_BYTES

    candidates = [pair for pair in catalog.pairs if pair.same_vocabulary and light(pair)]
    pairs = [pair for pair in candidates if needed(pair) <= available]
    if not pairs:
        least = min(map(needed, candidates), default=0)
        raise NotEnoughSpace(
            f"the smallest pair for a demo needs {least / 2**30:.1f} GiB of memory and"
            f" {available / 2**30:.1f} GiB are free; close programs, or use"
            " `mlxroute ask --small NAME --large URL`"
        )
    return sorted(pairs, key=lambda pair: catalog.get_model(pair.large).parameters, reverse=True)


def host_choice(catalog: Catalog, *, available: int, dense: bool) -> Model:
    """The model to serve when none is named: the largest that fits and is not a burden."""
    limit = _DEMO_CPU_PARAMETERS if dense else _DEMO_DOWNLOAD_BYTES
    light = [
        model
        for model in catalog.models
        if (
            model.index is not None and model.parameters <= limit
            if dense
            else model.hub_bytes <= limit
        )
    ]
    fitting = [m for m in light if resident_bytes(m, dense=dense) <= available]
    if not fitting:
        least = min(light, key=lambda model: model.parameters)
        check_fits(least, catalog, available=available, dense=dense)
    return max(fitting, key=lambda model: model.parameters)


def check_fits(model: Model, catalog: Catalog, *, available: int, dense: bool) -> None:
    """Raise NotEnoughSpace, with figures and a smaller choice, when a model does not fit."""
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
        f"{model.name} needs {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB"
        f" are free{hint}"
    )
