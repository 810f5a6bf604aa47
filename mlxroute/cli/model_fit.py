"""Which catalogue models fit this machine's memory, and which program serves them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mlxroute.backend.load import OVERHEAD_BYTES, gguf_memory_needed, require_memory
from mlxroute.catalog import Catalog, Model, Pair
from mlxroute.catalog.model_keys import is_gguf_name
from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import Settings
from mlxroute.config.setting_choices import EngineName
from mlxroute.errors import NotEnoughSpace
from mlxroute.weights import WeightsSize

# A first try should not begin with a download of half an hour.
_DEMO_DOWNLOAD_BYTES = 6 * 10**9
_DEMO_CPU_PARAMETERS = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine runs models with.

    Args:
        is_dense: Whether MLX has dense float32 weights here, as on its CPU backend.
        available_bytes: Free memory.
        engine: Program that serves a large model here, a value of `EngineName`.
    """

    is_dense: bool
    available_bytes: int
    engine: str

    def serves_gguf(self, spec: str, catalog: Catalog) -> bool:
        """Return whether llama.cpp serves the model that `spec` names, from its GGUF file."""
        if self.engine != EngineName.AUTO:
            return self.engine == EngineName.LLAMA_CPP
        model = catalog.find_model(spec)
        has_gguf = is_gguf_name(Path(spec)) if model is None else model.index is not None
        return self.is_dense and has_gguf

    def loaded_bytes(self, model: Model) -> int:
        """Return the memory that a model takes in MLX."""
        size = model.float32_bytes if self.is_dense else model.hub_bytes
        return size + OVERHEAD_BYTES

    def served_bytes(self, model: Model) -> int:
        """Return the memory that a model takes in the program that serves it."""
        served_by_llama_cpp = self.engine == EngineName.LLAMA_CPP or (
            self.engine == EngineName.AUTO and self.is_dense
        )
        if model.index and served_by_llama_cpp:
            return gguf_memory_needed(model.index.gguf_bytes)
        return self.loaded_bytes(model)

    def require_memory(self, size: WeightsSize) -> None:
        """Raise NotEnoughSpace for a large model that does not fit in MLX's memory."""
        weights = size.float32_bytes if self.is_dense else size.stored_bytes
        require_memory(weights + OVERHEAD_BYTES, self.available_bytes, name=size.name, role="large")

    def serves_quickly(self, model: Model) -> bool:
        """Return whether a first try of a served model begins and answers soon enough."""
        if self.is_dense or self.engine == EngineName.LLAMA_CPP:
            return model.index is not None and model.parameters <= _DEMO_CPU_PARAMETERS
        return model.hub_bytes <= _DEMO_DOWNLOAD_BYTES


def measure_machine(settings: Settings) -> Machine:
    """Return what this machine runs models with, with the engine of the settings."""
    from mlxroute.backend import blas, memory
    from mlxroute.backend.load import on_cpu

    blas.interpose(cache_dir_of(settings))
    available = sys.maxsize if settings.skip_memory_check else memory.available_bytes()
    return Machine(on_cpu(), available, settings.engine)


def demo_pairs(catalog: Catalog, machine: Machine, *, small: str) -> list[Pair]:
    """Return the pairs that the demo may use here, the best first.

    Those with the default model `small` come first, then those with the largest large model.
    Raises NotEnoughSpace if the smallest of them needs more memory than is free.
    """

    def needed(pair: Pair) -> int:
        small_bytes = machine.loaded_bytes(catalog.get_model(pair.small))
        return small_bytes + machine.served_bytes(catalog.get_model(pair.large))

    def is_light(pair: Pair) -> bool:
        small, large = catalog.get_model(pair.small), catalog.get_model(pair.large)
        downloads_quickly = small.hub_bytes + large.hub_bytes <= _DEMO_DOWNLOAD_BYTES
        return machine.serves_quickly(large) and (machine.is_dense or downloads_quickly)

    candidates = [pair for pair in catalog.pairs if pair.same_vocabulary and is_light(pair)]
    pairs = [pair for pair in candidates if needed(pair) <= machine.available_bytes]
    if not pairs:
        least = min(map(needed, candidates), default=0)
        raise NotEnoughSpace(
            f"the smallest pair for a demo needs {_gibibytes(least)} of memory and"
            f" {_gibibytes(machine.available_bytes)} are free; close programs, use"
            " `mlxroute ask --small NAME --large URL`, or skip this check",
            parameter="skip_memory_check",
        )

    def rank(pair: Pair) -> tuple[bool, int]:
        return pair.small == small, catalog.get_model(pair.large).parameters

    return sorted(pairs, key=rank, reverse=True)


def default_host_model(catalog: Catalog, machine: Machine, *, small: str) -> Model:
    """Return the model that `host` serves by default, among those that fit and download quickly.

    It is the largest that is paired with the default model `small`, else the largest of all.
    Raises NotEnoughSpace if none fits.
    """
    light = [model for model in catalog.models if machine.serves_quickly(model)]
    fitting = [model for model in light if machine.served_bytes(model) <= machine.available_bytes]
    if not fitting:
        check_fits(min(light, key=lambda model: model.parameters), catalog, machine)
    partners = {pair.large for pair in catalog.pairs if pair.small == small}
    return max(fitting, key=lambda model: (model.name in partners, model.parameters))


def check_fits(model: Model, catalog: Catalog, machine: Machine) -> None:
    """Raise NotEnoughSpace, naming a smaller model that would fit, if a served model does not."""
    needed, available = machine.served_bytes(model), machine.available_bytes
    if needed <= available:
        return
    smaller = [
        other
        for other in catalog.models
        if machine.served_bytes(other) <= available and other.parameters < model.parameters
    ]
    choice = max(smaller, key=lambda other: other.parameters, default=None)
    hint = f"; {choice.name} would fit" if choice else "; no model of the catalogue is small enough"
    raise NotEnoughSpace(
        f"{model.name} needs {_gibibytes(needed)} of memory and {_gibibytes(available)}"
        f" are free{hint}, or skip this check",
        parameter="skip_memory_check",
    )


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
