"""The models, router and options behind a run of questions."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.catalog.head_files import find_head_file
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.large_side import large_model
from mlxroute.config import Settings, read_never_send, read_prices, user_catalog_dir
from mlxroute.errors import LargeError, LargeUnrecorded, UsageError
from mlxroute.ledger import Ledger
from mlxroute.routers import BURST, Budget, Router, make_router
from mlxroute.types import Message, Mode, Prices, RunStats, Uploads

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.catalog import Pair
    from mlxroute.engine import Answer
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel

HEAD = "head"
DEFAULT_SMALL = "qwen2.5-coder-0.5b"
DEFAULT_ROUTER = "entropy"
# Where a router's scores are known by rank and nothing else is said.
DEFAULT_RATE = 0.07
# As calibrated for the default small model.
DEFAULT_THRESHOLD_NATS = 1.64
# Calls for each that is needed, where calls have a price.
_METERED_CEILING = 1.5
_OFFLINE = "--offline: the small model answers alone"
_NO_LARGE = (
    "no large model: the small one answers alone. Give a server with --large URL (or"
    " OPENAI_BASE_URL), or start one here with `mlxroute host`."
)


class Session:
    """The models, router and options behind a run of questions."""

    def __init__(
        self,
        small: SmallModel,
        large: LargeModel | None,
        settings: Settings,
        *,
        router: Router,
        ranks: ScoreRanks,
        ledger: Ledger,
        never_send: tuple[re.Pattern[str], ...],
        prices: Prices | None = None,
    ) -> None:
        from mlxroute.conversation import Conversation
        from mlxroute.engine import Experience

        self.small = small
        self.large = large
        self.settings = settings
        self._router = router
        self._ranks = ranks
        self._ledger = ledger
        self._never_send = never_send
        self._warned: set[str] = set()
        self.prices = prices
        self.modes = tuple(Mode)
        self._experience = Experience()
        self.mode: str = settings.mode
        self.conversation = Conversation(system=settings.system)

    @property
    def threshold(self) -> float:
        """The score above which the large model is asked next; inf when there is none."""
        return math.inf if self.large is None else self._router.state.threshold

    @threshold.setter
    def threshold(self, score: float) -> None:
        self._turn_to(threshold=score)

    @property
    def budget(self) -> float | None:
        """The share of tokens that may be the large model's; None where a threshold is set."""
        pace = self._router.state
        return pace.rate if isinstance(pace, Budget) else None

    def keep_within(self, budget: float) -> None:
        """Ask at no more than this share of the tokens from now on."""
        self._turn_to(budget=budget)

    def _turn_to(self, **chosen: float) -> None:
        if self.large is None:
            raise UsageError("there is no large model to ask; start with --large URL")
        self._router = make_router(
            self._router.name, quantiles=self._ranks[self._router.name], **chosen
        )

    @property
    def uploads(self) -> Uploads:
        """What was sent since the start."""
        return self._ledger.uploads

    def warnings(self, stats: RunStats) -> list[str]:
        """What the user should know after an answer; each kind of warning comes once."""
        found = {"ledger": self._ledger.failure} if self._ledger.failure else {}
        if stats.withheld:
            noun = "position" if stats.withheld == 1 else "positions"
            found["withheld"] = f"{stats.withheld:,} {noun} kept local by --never-send"
        if stats.held:
            found["held"] = (
                f"the cache of {self.small.name} cannot give tokens back at every length:"
                " while the large model is asked, decoding stands still there"
            )
        if stats.advice:
            found["advice"] = stats.advice
        new = [line for kind, line in found.items() if kind not in self._warned]
        self._warned |= found.keys()
        return new

    def answer(self, messages: Sequence[Message]) -> Answer:
        """Start answering a conversation."""
        from mlxroute.engine import generate

        settings = self.settings
        return generate(
            self.small,
            self.large,
            messages,
            router=self._router if self.large else make_router("entropy", threshold=math.inf),
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            timeout_s=settings.timeout,
            strict=settings.strict,
            never_send=self._never_send,
            prices=self.prices,
            mode=self.mode,
            prefetch=settings.prefetch,
            call_ceiling=self._call_ceiling,
            experience=self._experience,
        )

    @property
    def _call_ceiling(self) -> float | None:
        """Calls that are paid for are not made lightly."""
        chosen = self.settings.call_ceiling
        metered = self.prices is not None and self.mode == Mode.AUTO
        return _METERED_CEILING if chosen is None and metered else chosen

    def describe(self) -> str:
        """One line: which models, and when the large one is asked."""
        if self.large is None:
            return f"{self.small.name} alone"
        return (
            f"{self.small.name}, asking {self.large.model_name} at {self.large.base_url}"
            f" {self.rule()}"
        )

    @property
    def router_name(self) -> str:
        """What positions are scored by."""
        return self._router.name

    @property
    def allowance(self) -> str | None:
        """How often the large model may be asked, in words; None where a threshold is set."""
        share = self.budget
        return None if share is None else f"{100 * share:g}% of the tokens and {BURST:g} more"

    @property
    def unit(self) -> str:
        """What a threshold is counted in."""
        name = self._router.name
        return "nats" if name == DEFAULT_ROUTER else f"of {name}"

    def rule(self) -> str:
        """When the large model is asked, in words."""
        share = self.budget
        if share is not None:
            return f"for {100 * share:g}% of the tokens, by {self._router.name}"
        return f"above {self.threshold:g} {self.unit}"

    def close(self) -> None:
        if self.large is not None:
            self.large.close()
        self._ledger.close()


def open_session(settings: Settings, err: Console) -> Session:
    """Check the settings, reach the large side, load the small model."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.progress import Reporter

    _check(settings)
    never_send, prices = read_never_send(settings), read_prices(settings)
    with ExitStack() as opened:
        ledger = opened.enter_context(open_ledger(settings))
        large = _open_large(settings, ledger, err)
        with Reporter(err) as reporter:
            small = load_small(settings, reporter)
            if large is None:
                reporter.notify(_OFFLINE if settings.offline else _NO_LARGE)
            else:
                _introduce(large, small, reporter)
        catalog = Catalog.load(user_catalog_dir())
        if prices is None and large is not None:
            prices = catalog.find_prices(large.model_name)
        pair = catalog.find_pair(small.name, large.model_name) if large else None
        pair = pair or catalog.find_pair(small.name)
        name = router_of(settings, pair)
        ranks = ranks_of(small, name, settings.head)
        session = Session(
            small,
            large,
            settings,
            router=chosen_router(name, settings, pair, ranks),
            ranks=ranks,
            ledger=ledger,
            never_send=never_send,
            prices=prices,
        )
        opened.pop_all()
    return session


def _introduce(large: LargeModel, small: SmallModel, reporter: Any) -> None:
    """Compare the two vocabularies now, not at the first escalation."""
    if not large.connected:
        return
    with contextlib.suppress(LargeError):
        if large.pair_vocabulary(small.vocabulary):
            return
        line = f"{large.model_name} has another vocabulary than {small.name}"
        if not large.knows_chat_template:
            line += "; its chat template is not known here, so it reads the small model's"
        reporter.notify(line)


def open_ledger(settings: Settings) -> Ledger:
    """The record of what is sent, in the file of the settings if they name one."""
    return Ledger(Path(settings.ledger).expanduser() if settings.ledger else None)


def load_small(settings: Settings, reporter: Any) -> SmallModel:
    """The small model of the settings, with progress on the terminal."""
    from mlxroute.small import SmallModel

    return SmallModel.load(
        settings.small or DEFAULT_SMALL,
        adapter=Path(settings.adapter).expanduser() if settings.adapter else None,
        cache_dir=Path(settings.cache_dir).expanduser() if settings.cache_dir else None,
        offline=settings.offline,
        kernel=settings.kernel,
        progress=reporter.progress,
        notify=reporter.notify,
    )


def _check(settings: Settings) -> None:
    """Refuse bad values before anything is fetched or loaded."""
    from mlxroute.engine import Options, parse_mode
    from mlxroute.types import Sampling

    name = settings.router or DEFAULT_ROUTER
    make_router(name, threshold=0.0 if settings.threshold is None else settings.threshold)
    Options(
        max_tokens=settings.max_tokens,
        sampling=Sampling(settings.temperature, settings.top_p, settings.seed),
        timeout_s=settings.timeout,
        mode=parse_mode(settings.mode),
        call_ceiling=settings.call_ceiling,
        prefetch=settings.prefetch,
    )


def _open_large(settings: Settings, ledger: Ledger, err: Console) -> LargeModel | None:
    if settings.offline or settings.large is None:
        return None
    large = large_model(settings, settings.large, ledger)
    try:
        with err.status(f"reaching {large.base_url}"):
            large.connect()
    except LargeUnrecorded as exc:
        raise UsageError(str(exc)) from exc
    except LargeError as exc:
        from mlxroute.safe_text import printable

        if settings.strict:
            raise
        err.print(
            f"warning: {printable(str(exc))}; until it answers the small model writes alone",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    return large


def router_of(settings: Settings, pair: Pair | None) -> str:
    """What positions are scored by: the flag, else the catalogue's choice for the pair.

    A threshold is of one router's scores, so without `--router` it is one of entropy.
    """
    if settings.router is not None:
        return settings.router
    return DEFAULT_ROUTER if pair is None or settings.threshold is not None else pair.router


def ranks_of(small: SmallModel, router: str, head: str | None = None) -> ScoreRanks:
    """What is known of a small model's scores; with those of a head, which it then evaluates.

    `head` is a file, None for the one that is known for the model. Raises UsageError for none.
    """
    folder = user_catalog_dir()
    ranks = ScoreRanks.find(small.name, folder)
    if router != HEAD:
        return ranks
    file = find_head_file(small.name, folder) if head is None else Path(head).expanduser()
    if file is None:
        raise UsageError(
            f"no head is known for {small.name}; `mlxroute train` fits one, --head FILE names one"
        )
    return ranks.with_quantiles(HEAD, small.load_head(file))


def chosen_router(name: str, settings: Settings, pair: Pair | None, ranks: ScoreRanks) -> Router:
    """The router at the budget or threshold of the flags, else at its default rate."""
    if settings.budget is not None:
        return make_router(name, budget=settings.budget, quantiles=ranks[name])
    if settings.threshold is not None:
        return make_router(name, threshold=settings.threshold)
    if name != DEFAULT_ROUTER:
        return make_router(name, threshold=ranks.threshold_at_rate(name, DEFAULT_RATE))
    return make_router(name, threshold=pair.threshold if pair else DEFAULT_THRESHOLD_NATS)
