"""What an endpoint serves: two models, and the options that a request can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mlxroute.answers.document import ModelPair
from mlxroute.engine import Experience, Options
from mlxroute.routers import EntropyRouter, Router

if TYPE_CHECKING:
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel

MakeRouter = Callable[[float | None, float | None], Router]
"""Makes the router of one answer from a budget and a threshold; None is not set."""


def _make_entropy_router(budget: float | None, threshold: float | None) -> Router:
    return EntropyRouter(threshold, budget=budget)


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class ServingSession:
    """Two models and what applies to a request that says nothing else.

    Args:
        small: The small model, which nothing else may use.
        large: The large model; None where the small one answers alone.
        make_router: Makes a router in its first state; without a budget and a threshold, by the
            session's own rule. An `EntropyRouter` by default.
        options: Limits, sampling and mode. The library's defaults by default.
        adapt_options: Returns the options of an answer with those values that depend on what is
            known of the server by then. By default the same.
        find_models: Returns the models as answer documents name them, by what is known by then.
            None (default) to name them by `small` and `large`.
        experience: Measurements of the pair. New by default.
        redact: Removes secrets from a JSON value of an answer document. By default nothing.
    """

    small: SmallModel
    large: LargeModel | None
    make_router: MakeRouter = _make_entropy_router
    options: Options = field(default_factory=Options)
    adapt_options: Callable[[Options], Options] = _unchanged
    find_models: Callable[[], ModelPair] | None = None
    experience: Experience = field(default_factory=Experience)
    redact: Callable[[Any], Any] = _unchanged

    @property
    def small_name(self) -> str:
        """The name of the small model; of a path of this machine, only the last part."""
        name = self.small.name
        return PurePath(name).name or name if _is_place(name) else name

    @property
    def model_pair(self) -> ModelPair:
        """The models as answer documents name them, which clients can read."""
        if self.find_models is not None:
            return _without_places(replace(self.find_models(), small=self.small_name))
        large = self.large
        return ModelPair(
            small=self.small_name,
            small_spec=None,
            adapter=None,
            large=None if large is None else large.model_name,
            large_url=None if large is None else large.base_url,
            small_files=self.small.fingerprint or None,
        )


def _without_places(models: ModelPair) -> ModelPair:
    """Return the models without the places of their files on this machine."""
    specs = models.small_spec, models.adapter
    if any(spec is not None and _is_place(spec) for spec in specs):
        # One without the other would load another model.
        return replace(models, small_spec=None, adapter=None)
    return models


def _is_place(name: str) -> bool:
    """Return whether a model is named by a path that tells where on this machine it is."""
    return name.startswith(("~", ".")) or PurePath(name).is_absolute()
