"""A session: what one run of `ask`, `chat`, `demo` or `serve` keeps between answers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute.cli.large_setup import connect_large, open_ledger
from mlxroute.cli.routing import (
    HEAD_ROUTER,
    NEVER_LARGE,
    RoutingRule,
    choose_router_name,
    head_file,
    make_routing,
    warn_of_other_head,
    without_head,
)
from mlxroute.cli.server_offers import no_large_lines
from mlxroute.cli.small_setup import default_small, load_small, small_name
from mlxroute.cli.terminal import print_note
from mlxroute.cli.vocabulary_note import pair_vocabularies
from mlxroute.config import (
    SERVER_SETTINGS,
    Settings,
    read_never_send,
    read_prices,
    user_catalog_dir,
)
from mlxroute.conversation import Conversation
from mlxroute.errors import UsageError
from mlxroute.ledger import Ledger
from mlxroute.types import (
    CallFailure,
    Message,
    Mode,
    OnFailure,
    Prices,
    RunStats,
    Uploads,
    ignore_failure,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.answers.document import ModelPair
    from mlxroute.answers.recorded_answer import RecordedAnswer
    from mlxroute.catalog import Catalog, Pair
    from mlxroute.engine import Options
    from mlxroute.large import LargeModel
    from mlxroute.small import SmallModel

# Calls per escalated position in mode `auto` where calls cost money.
_PRICED_CALL_CEILING = 1.5
# The same in every mode where the reply to each call repeats the end of the answer.
_FRAMED_CALL_CEILING = 1.0
_OFFLINE = "--offline: the small model answers alone"


class Session:
    """Two models, the rule that routes between them, and the conversation so far.

    Args:
        small: The small model.
        large: The large model; None if the small one answers alone.
        settings: The settings of the run.
        routing: The router, with its threshold or budget.
        ledger: The record of what is sent; `close` closes it.
        never_send: Patterns of text that must stay on this machine.
        catalog: The catalogue, for the prices of a large model of which the settings have none.
            None (default) for the prices of the settings alone.
        connection_failure: Why the large model could not be reached, as the user was told; the
            first answer does not repeat it. None (default) if it could.
    """

    def __init__(
        self,
        small: SmallModel,
        large: LargeModel | None,
        settings: Settings,
        *,
        routing: RoutingRule,
        ledger: Ledger,
        never_send: tuple[re.Pattern[str], ...],
        catalog: Catalog | None = None,
        connection_failure: str | None = None,
    ) -> None:
        from mlxroute.engine import Experience
        from mlxroute.view.answer_warnings import AnswerWarnings

        self.small = small
        self.large = large
        self.routing = routing
        self.mode: str = settings.mode
        self.conversation = Conversation(system=settings.system)
        self.never_send = never_send
        self._settings = settings
        self._ledger = ledger
        self._catalog = catalog
        self._experience = Experience()
        self._warnings = AnswerWarnings()
        self._connection_failure = connection_failure
        # What went to servers before the present one, and what that cost.
        self._earlier_uploads = Uploads()
        self._earlier_cost: float | None = None

    @property
    def uploads(self) -> Uploads:
        """What was sent since the start of the session."""
        return self._ledger.uploads

    @property
    def timeout_s(self) -> float:
        """The time limit of one call, in seconds."""
        return self._settings.timeout

    @property
    def prices(self) -> Prices | None:
        """The prices of the settings, else the catalogue's for the large model as known by now."""
        prices, large = read_prices(self._settings), self.large
        if prices is not None or large is None or self._catalog is None:
            return prices
        return self._catalog.find_prices(large.model_name)

    @property
    def cost(self) -> float | None:
        """The estimated cost of the uploads to servers with known prices; None if there is none."""
        prices = self.prices
        if prices is None:
            return self._earlier_cost
        return (self._earlier_cost or 0.0) + prices.cost(self.uploads - self._earlier_uploads)

    @property
    def options(self) -> Options:
        """The options of the next answer."""
        from mlxroute.engine import Options, parse_mode

        settings = self._settings
        mode = parse_mode(self.mode)
        options = Options(
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            sampling=settings.sampling,
            timeout_s=settings.timeout,
            strict=settings.strict,
            never_send=self.never_send,
            mode=mode,
            prefetch=settings.prefetch,
            accept_within=settings.accept_within,
        )
        return self.adapt_options(options)

    def adapt_options(self, options: Options) -> Options:
        """Return the options with the prices and the limit on calls of the server as known now."""
        return replace(options, prices=self.prices, call_ceiling=self.call_ceiling(options.mode))

    @property
    def model_pair(self) -> ModelPair:
        """The models as answer documents name them."""
        from mlxroute.answers.document import ModelPair

        settings, large = self._settings, self.large
        return ModelPair(
            small=self.small.name,
            small_spec=settings.small or default_small(),
            adapter=settings.adapter,
            large=None if large is None else large.model_name,
            large_url=None if large is None else large.base_url,
            small_files=self.small.fingerprint or None,
        )

    def answer(
        self, messages: Sequence[Message], *, on_failure: OnFailure = ignore_failure
    ) -> RecordedAnswer:
        """Start to answer a conversation; `on_failure` as in `generate`."""
        from mlxroute.answers.document import OptionsRecord
        from mlxroute.answers.recorded_answer import AnswerOrigin, RecordedAnswer
        from mlxroute.answers.reply_recorder import ReplyRecorder
        from mlxroute.answers.router_record import record_router
        from mlxroute.engine import Answer

        recorder = None if self.large is None else ReplyRecorder(self.large)
        router = self.routing.router
        options = self.options
        reported, self._connection_failure = self._connection_failure, None

        def report(failure: CallFailure) -> None:
            if failure.reason != reported:
                on_failure(failure)

        origin = AnswerOrigin(
            messages=list(messages),
            vocabulary=self.small.vocabulary,
            models=self.model_pair,
            router=record_router(router, head_sha256=self.small.head_sha256),
            options=OptionsRecord.of(options),
        )
        answer = Answer(
            self.small,
            recorder,
            messages,
            router=router,
            options=options,
            experience=self._experience,
            on_failure=report,
        )
        return RecordedAnswer(answer, origin, recorder)

    def save_answer(self, answer: RecordedAnswer, path: Path) -> None:
        """Write the document of an answer to a file. Raises UsageError."""
        from mlxroute.answers.document_file import save_document

        save_document(answer.document(), path, redact=self.redact)

    def redact(self, value: Any) -> Any:
        """Return a JSON value without the server's key."""
        return self._ledger.secrets.redact_json(value)

    def save_conversation(self, path: Path) -> None:
        """Write the conversation to a file. Raises UsageError."""
        self.conversation.save(path, redact=self.redact)

    def change_large(self, address: str, model: str | None, err: Console) -> None:
        """Use another large model from the next answer on.

        Raises UsageError, and changes nothing, for an address that cannot be used.
        """
        # A key that no address was named for so far is that of the server used so far.
        server = self._settings.key_server or self._settings.large
        changes: dict[str, Any] = dict.fromkeys(SERVER_SETTINGS)
        changes |= {"large": address, "large_model": model, "key_server": server}
        settings = replace(self.routing.as_settings(self._settings), **changes)
        if settings.offline:
            raise UsageError(NEVER_LARGE)
        cost, uploads = self.cost, self.uploads
        before = self.large
        large = None
        try:
            large, failure = connect_large(settings, self._ledger, err)
            self._change_models(self.small, large, settings, err)
        except BaseException:
            # What was sent to the other server is not charged at the prices of this one.
            self._earlier_uploads += self.uploads - uploads
            if large is not None:
                large.close()
            raise
        self._earlier_uploads, self._earlier_cost = uploads, cost
        self._connection_failure = failure
        if before is not None:
            # The change has been made, and ends no other way.
            with suppress(KeyboardInterrupt):
                before.close()

    def change_small(self, name: str, err: Console) -> None:
        """Use another small model from the next answer on.

        Raises an error, and changes nothing, if the model cannot be loaded.
        """
        from mlxroute.cli.progress import ByteProgress

        before = self.routing.as_settings(self._settings)
        # An adapter and a head belong to one small model.
        settings = replace(without_head(before), small=name, adapter=None)
        with ByteProgress(err) as progress:
            small = load_small(settings, progress)
        self._change_models(small, self.large, settings, err)
        if settings.threshold != before.threshold:
            print_note(err, "the threshold was on the scale of the earlier head, so it was dropped")

    def _change_models(
        self, small: SmallModel, large: LargeModel | None, settings: Settings, err: Console
    ) -> None:
        """Replace the models, and the router by that of the settings."""
        from mlxroute.cli.progress import ByteProgress
        from mlxroute.engine import Experience

        if large is not None:
            with ByteProgress(err) as progress:
                pair_vocabularies(large, small, progress)
        pair = _find_pair(small, large)
        routing = make_routing(small, large, settings, pair)
        routing.go_on_from(self.routing, same_small=small is self.small)
        self.small, self.large, self.routing = small, large, routing
        self._settings = settings
        self._experience = Experience()
        self._warnings.clear()

    def call_ceiling(self, mode: Mode) -> float | None:
        """Return the limit on calls per escalated position in a mode; None for none."""
        chosen = self._settings.call_ceiling
        if chosen is None and self.large is not None and self.large.is_approximate:
            return _FRAMED_CALL_CEILING
        if chosen is None and self.prices is not None and mode == Mode.AUTO:
            return _PRICED_CALL_CEILING
        return chosen

    def warnings(self, stats: RunStats) -> list[str]:
        """Return the warnings about an answer, each kind once in a session."""
        from mlxroute.view.answer_warnings import common_warnings
        from mlxroute.view.figures import format_count

        warnings = {}
        is_said = any(failure.reason == self._ledger.failure for failure in stats.failures)
        if self._ledger.failure and not is_said:
            warnings["ledger"] = self._ledger.failure
        if stats.withheld:
            withheld = format_count(stats.withheld, "position")
            warnings["withheld"] = f"{withheld} kept local by --never-send"
        warnings |= common_warnings(
            stats, large=self.large, small_name=self.small.name, show_names=True
        )
        return self._warnings.new_lines(warnings)

    def describe(self) -> str:
        """Return one line about the models and which tokens the large one is asked for."""
        if self.large is None:
            return f"{self.small.name} alone"
        return (
            f"{self.small.name}, asking {self.large.model_name} at {self.large.base_url}"
            f" {self.routing.describe()}"
        )

    def close(self) -> None:
        """Close the connections and the ledger."""
        if self.large is not None:
            self.large.close()
        self._ledger.close()


def open_session(
    settings: Settings, err: Console, *, command: str, words: Sequence[str] = ()
) -> Session:
    """Check the settings, connect to the large model's server and load the small model.

    `command` and its arguments, `words`, are repeated where a server is offered.
    """
    from mlxroute.catalog import Catalog
    from mlxroute.cli.progress import ByteProgress

    _check_files(settings)
    never_send = read_never_send(settings)
    # Incomplete prices are reported before the server is asked.
    read_prices(settings)
    with ExitStack() as resources:
        ledger = resources.enter_context(open_ledger(settings))
        large, failure = connect_large(settings, ledger, err)
        if large is not None:
            resources.callback(large.close)
        with ByteProgress(err) as progress:
            if large is None:
                for line in _no_large_lines(settings, command, words):
                    progress.notify(line)
            small = load_small(settings, progress)
            if large is not None:
                pair_vocabularies(large, small, progress)
        session = Session(
            small,
            large,
            settings,
            routing=make_routing(small, large, settings, _find_pair(small, large)),
            ledger=ledger,
            never_send=never_send,
            catalog=Catalog.load(user_catalog_dir()),
            connection_failure=failure,
        )
        warn_of_other_head(small, err)
        resources.pop_all()
    return session


def _find_pair(small: SmallModel, large: LargeModel | None) -> Pair | None:
    """Return the catalogue's entry for two models, else for the small one."""
    from mlxroute.catalog import Catalog

    catalog = Catalog.load(user_catalog_dir())
    pair = catalog.find_pair(small.name, large.model_name) if large else None
    return pair or catalog.find_pair(small.name)


def _check_files(settings: Settings) -> None:
    """Raise UsageError for a missing head or a bad adapter, before anything is fetched."""
    name = small_name(settings)
    if choose_router_name(settings) == HEAD_ROUTER or settings.head is not None:
        head_file(name, settings.head)


def _no_large_lines(settings: Settings, command: str, words: Sequence[str]) -> list[str]:
    if settings.offline:
        return [_OFFLINE]
    if settings.small is not None:
        command += f" --small {shlex.quote(settings.small)}"
    return no_large_lines(command, words)
