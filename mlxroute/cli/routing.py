"""The router of the settings, and changes to its threshold or budget in a chat."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.catalog.head_files import find_head_file
from mlxroute.catalog.model_keys import plain_name
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.folders import expand_optional
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import UsageError
from mlxroute.routers import BURST, DEFAULT_BUDGET, Budget, Router, make_router
from mlxroute.safe_text import printable_line

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.catalog import Pair
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel

HEAD_ROUTER = "head"
DEFAULT_ROUTER = "entropy"
NEVER_LARGE = "with --offline there is no large model; start without it"


class RoutingRule:
    """The router of a session, with a threshold or budget that can be changed.

    Without a large model nothing is escalated: the threshold is inf and cannot be changed.

    Args:
        router: The router with its first threshold or budget.
        ranks: Calibrated scores, from which a new budget starts.
        has_large: Whether there is a large model.
        is_offline: Whether there can be none. False by default.
    """

    def __init__(
        self, router: Router, ranks: ScoreRanks, *, has_large: bool, is_offline: bool = False
    ) -> None:
        self._router = router
        self._ranks = ranks
        self._has_large = has_large
        self._is_offline = is_offline

    @property
    def router(self) -> Router:
        """The router for the next answer."""
        if self._has_large:
            return self._router
        return make_router(self.name, threshold=math.inf)

    @property
    def name(self) -> str:
        """The name of the score."""
        return self._router.name

    @property
    def unit(self) -> str:
        """The unit of the threshold."""
        return "nats" if self.name == DEFAULT_ROUTER else f"of {self.name}"

    @property
    def threshold(self) -> float:
        """The score above which the next position is escalated."""
        return self._router.state.threshold if self._has_large else math.inf

    @property
    def budget(self) -> float | None:
        """The largest share of escalated tokens; None with a threshold or without a large model."""
        state = self._router.state
        return state.rate if isinstance(state, Budget) and self._has_large else None

    def as_settings(self, settings: Settings) -> Settings:
        """Return the settings with the present threshold or budget.

        With a threshold they name this router, unless they already choose it. Without a large model
        they stay as they are.
        """
        if not self._has_large:
            return settings
        if self.budget is not None:
            return replace(settings, budget=self.budget, threshold=None)
        changed = replace(settings, threshold=self.threshold, budget=None)
        is_chosen = choose_router_name(changed) == self.name
        return changed if is_chosen else replace(changed, router=self.name)

    def new_router(self, *, budget: float | None = None, threshold: float | None = None) -> Router:
        """Return a router in its first state, by default with this rule's threshold or budget."""
        if not self._has_large:
            return self.router
        if budget is None and threshold is None:
            budget = self.budget
            threshold = self.threshold if budget is None else None
        return make_router(
            self.name, budget=budget, threshold=threshold, quantiles=self._ranks[self.name]
        )

    def set_threshold(self, threshold: float) -> None:
        """Escalate above this score from now on. Raises UsageError without a large model."""
        self._check_large()
        self._router = make_router(self.name, threshold=threshold)

    def set_budget(self, budget: float) -> None:
        """Escalate at most this share from now on. Raises UsageError without a large model.

        After another budget, what was escalated so far still counts.
        """
        self._check_large()
        state = self._router.state
        if isinstance(state, Budget):
            self._router = Router(self.name, state.with_rate(budget))
        else:
            self._router = self.new_router(budget=budget)

    def go_on_from(self, earlier: RoutingRule, *, same_small: bool) -> None:
        """Go on from an earlier rule: where both have a budget, what was escalated still counts.

        With the same small model and score, the latest scores count too.
        """
        state, before = self._router.state, earlier._router.state
        if not isinstance(state, Budget) or not isinstance(before, Budget):
            return
        if same_small and self.name == earlier.name:
            state = before.with_rate(state.rate)
        else:
            state = replace(state, bucket=before.bucket, positions=before.positions)
        self._router = Router(self.name, state)

    def describe(self) -> str:
        """Return in words which tokens the large model is asked for."""
        if (budget := self.describe_budget()) is not None:
            return f"for at most {budget}, by {self.name}"
        unit = f" {self.unit}" if self.name == DEFAULT_ROUTER else ""
        return f"where {self.name} is above {self.threshold:g}{unit}"

    def describe_budget(self) -> str | None:
        """Return the budget in words; None if a threshold is set instead."""
        if self.budget is None:
            return None
        return f"{100 * self.budget:g}% of the tokens and {BURST:g} more"

    def _check_large(self) -> None:
        if self._is_offline:
            raise UsageError(NEVER_LARGE)
        if not self._has_large:
            raise UsageError("there is no large model to ask; name one with /large URL")


def choose_router_name(settings: Settings, pair: Pair | None = None) -> str:
    """Return the router of the settings, else that of the catalogue for the pair.

    A head without a router is used. A threshold without either is one of entropy, because each
    router has its own scale.
    """
    if settings.router is not None:
        return settings.router
    if settings.head is not None:
        return HEAD_ROUTER
    return DEFAULT_ROUTER if pair is None or settings.threshold is not None else pair.router


def without_head(settings: Settings) -> Settings:
    """Return the settings without the head of `--head`, and without a threshold on its scale."""
    has_scale = settings.head is not None and choose_router_name(settings) == HEAD_ROUTER
    threshold = None if has_scale else settings.threshold
    return replace(settings, head=None, threshold=threshold)


def find_ranks(small: SmallModel, router: str, head: str | None = None) -> ScoreRanks:
    """Return the calibrated scores of a small model.

    For the `head` router, first load the head (a file; None: the one in the catalogue folders)
    into the model. Raises UsageError if there is no head for the model.
    """
    ranks = ScoreRanks.find(small.name, user_catalog_dir())
    if router != HEAD_ROUTER:
        return ranks
    return ranks.with_quantiles(HEAD_ROUTER, small.load_head(head_file(small.name, head)))


def head_file(small: str, head: str | None) -> Path:
    """Return the file of a learned head: `head`, else the one of the catalogue folders.

    `small` is the small model's name. Raises UsageError if there is no such file.
    """
    file = expand_optional(head)
    if file is not None:
        if not file.is_file():
            raise UsageError(f"there is no file {file}", parameter="head")
        return file
    file = find_head_file(small, user_catalog_dir())
    if file is None:
        raise UsageError(
            f"there is no head for {small}; fit one with `mlxroute train`, or name one with"
            " --head FILE"
        )
    return file


def warn_of_other_head(small: SmallModel, err: Console) -> None:
    """Print a warning if the head in use was fitted to another model."""
    from mlxroute.cli.terminal import WARNING_STYLE, print_note

    fitted_to = "" if small.head is None else plain_name(small.head.small)
    # One folder has several paths, and a copy of a model may have a head of the original.
    if fitted_to and Path(fitted_to).name != Path(small.plain_name).name:
        print_note(
            err,
            f"warning: the head was fitted to {printable_line(fitted_to)}, so its scores may mean"
            f" little for {small.plain_name}; fit one with `mlxroute train`",
            style=WARNING_STYLE,
        )


def choose_router(name: str, settings: Settings, ranks: ScoreRanks) -> Router:
    """Return the router at the threshold or budget of the settings, else at the default budget."""
    if settings.threshold is not None:
        return make_router(name, threshold=settings.threshold)
    budget = DEFAULT_BUDGET if settings.budget is None else settings.budget
    return make_router(name, budget=budget, quantiles=ranks[name])


def make_routing(
    small: SmallModel, large: LargeModel | None, settings: Settings, pair: Pair | None
) -> RoutingRule:
    """Return the rule with the router of the settings or of the pair."""
    name = choose_router_name(settings, pair)
    ranks = find_ranks(small, name, settings.head)
    return RoutingRule(
        choose_router(name, settings, ranks),
        ranks,
        has_large=large is not None,
        is_offline=settings.offline,
    )
