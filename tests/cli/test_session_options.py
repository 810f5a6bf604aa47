"""The options of a session's answers, in a terminal and in an endpoint."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import cast

import pytest
from rich.console import Console

from mlxroute.answers.document import ModelPair, OptionsRecord
from mlxroute.catalog import Catalog, Model
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.commands.serve import make_serving_session
from mlxroute.cli.routing import RoutingRule, make_routing
from mlxroute.cli.session import Session
from mlxroute.config import Settings
from mlxroute.engine import Options
from mlxroute.errors import UsageError
from mlxroute.large.negotiation.served_models import UNNAMED
from mlxroute.ledger import Ledger
from mlxroute.routers import Budget, make_router
from mlxroute.small import SmallModel
from mlxroute.types import Mode, Prices, Sampling
from tests.support.scripted_models import ScriptedLarge, ScriptedSmall

PRICES = Prices(input=2.0, cached_input=0.5, output=8.0)
PATTERNS = (re.compile("secret"),)
SETTINGS = Settings(
    small="folder/tiny",
    adapter="folder/adapter",
    mode="hedge",
    prefetch=3,
    call_ceiling=2.0,
    accept_within=0.5,
    max_tokens=7,
    temperature=0.8,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    seed=11,
    stop=("END",),
    timeout=4.0,
    strict=True,
    price_input=2.0,
    price_cached_input=0.5,
    price_output=8.0,
)
OPTIONS = Options(
    max_tokens=7,
    stop=("END",),
    sampling=Sampling(0.8, 0.9, 11, top_k=40, min_p=0.05),
    timeout_s=4.0,
    strict=True,
    never_send=PATTERNS,
    prices=PRICES,
    mode=Mode.HEDGE,
    prefetch=3,
    call_ceiling=2.0,
    accept_within=0.5,
)


def make_session(
    settings: Settings = SETTINGS, catalog: Catalog | None = None, ledger: Ledger | None = None
) -> Session:
    return Session(
        ScriptedSmall(b"x"),  # type: ignore[arg-type]
        ScriptedLarge([b"x"]),  # type: ignore[arg-type]
        settings,
        routing=RoutingRule(
            make_router("entropy", threshold=1.0), ScoreRanks("tiny", "none", 0, {}), has_large=True
        ),
        ledger=ledger or Ledger(),
        never_send=PATTERNS,
        catalog=catalog,
    )


def test_an_answer_has_the_options_of_the_settings_and_its_document_says_so() -> None:
    session = make_session()
    assert session.options == OPTIONS
    origin = session.answer([{"role": "user", "content": "hi"}]).origin
    assert origin.options == OptionsRecord(
        Mode.HEDGE, 3, 2.0, 0.5, 7, ("END",), 0.8, 0.9, 11, never_send=1, top_k=40, min_p=0.05
    )
    small, large = session.small, session.large
    assert large is not None
    assert origin.models == ModelPair(
        small.name, "folder/tiny", "folder/adapter", large.model_name, large.base_url
    )


def test_an_endpoint_has_the_same_options_but_the_stop_texts_of_its_requests() -> None:
    serving = make_serving_session(make_session())
    assert serving.options == replace(OPTIONS, stop=())
    assert serving.model_pair == make_session().model_pair


def test_a_server_that_comes_up_late_gets_its_prices_and_its_name_in_documents() -> None:
    model = Model("big", "none", 0, "me/big", 0, price=PRICES)
    session = make_session(Settings(), Catalog((model,), ()))
    large = cast("ScriptedLarge", session.large)
    large.model_name = UNNAMED
    serving = make_serving_session(session)
    before = serving.adapt_options(serving.options)
    assert (session.prices, before.prices, before.call_ceiling) == (None, None, None)
    large.model_name = "me/big"
    after = serving.adapt_options(serving.options)
    assert (session.options.prices, after.prices, after.call_ceiling) == (PRICES, PRICES, 1.5)
    assert serving.model_pair.large == "me/big"


def make_rule(name: str = "entropy", *, rate: float = 0.07, escalated: int = 0) -> RoutingRule:
    rule = RoutingRule(
        make_router(name, budget=rate), ScoreRanks("tiny", "none", 0, {}), has_large=True
    )
    for score in range(escalated):
        rule.router.state = rule.router.state.decide(5.0 + score)[1]
    return rule


def test_a_budget_that_is_set_in_a_chat_does_not_begin_anew() -> None:
    rule = make_rule(escalated=4)
    before = rule.router.state
    rule.set_budget(0.07)
    assert rule.router.state == before
    rule.set_budget(0.1)
    assert rule.router.state == before.with_rate(0.1)  # type: ignore[union-attr]
    rule.set_threshold(2.0)
    assert (rule.threshold, rule.budget) == (2.0, None)
    rule.set_budget(0.1)
    assert rule.router.state == make_rule(rate=0.1).router.state


@pytest.mark.parametrize("router", ["entropy", "margin"])
def test_other_models_in_a_chat_do_not_fill_the_budget_again(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(Settings())
    session.routing = make_rule(router, escalated=4)
    before = session.routing.router.state
    assert isinstance(before, Budget)
    monkeypatch.setattr("mlxroute.cli.session.pair_vocabularies", lambda *_: None)
    monkeypatch.setattr(ScriptedLarge, "close", lambda _: None, raising=False)
    large = ScriptedLarge([b"x"])
    monkeypatch.setattr("mlxroute.cli.session.connect_large", lambda *_: (large, None))
    session.change_large("http://box/v1", None, Console())
    after = session.routing.router.state
    assert isinstance(after, Budget)
    # The scores of another router, here the default one, mean something else.
    assert (after.recent == before.recent) == (router == "entropy")
    assert (after.bucket, after.positions) == (before.bucket, 4)
    monkeypatch.setattr("mlxroute.cli.session.load_small", lambda *_: ScriptedSmall(b"y"))
    session.change_small("other", Console())
    after = session.routing.router.state
    assert isinstance(after, Budget)
    assert after.recent != before.recent
    assert (after.bucket, after.positions) == (before.bucket, 4)


@pytest.mark.parametrize(
    ("offline", "advice"), [(True, "start without it"), (False, "name one with /large URL")]
)
def test_a_budget_without_a_large_model_is_refused_with_what_to_do(
    offline: bool, advice: str
) -> None:
    small: SmallModel = ScriptedSmall(b"x")  # type: ignore[assignment]
    rule = make_routing(small, None, Settings(offline=offline), None)
    assert (rule.budget, rule.threshold) == (None, math.inf)
    for change in (rule.set_budget, rule.set_threshold):
        with pytest.raises(UsageError, match=advice):
            change(0.05)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["load_small", "pair_vocabularies", "make_routing"])
def test_an_interrupted_change_of_the_small_model_leaves_both_models(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    before = (session.small, session.large, session.routing, session.model_pair)
    monkeypatch.setattr("mlxroute.cli.session.load_small", lambda *_: ScriptedSmall(b"y"))
    monkeypatch.setattr("mlxroute.cli.session.pair_vocabularies", lambda *_: None)
    monkeypatch.setattr(f"mlxroute.cli.session.{step}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.change_small("other", Console())
    assert (session.small, session.large, session.routing, session.model_pair) == before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of each server that is asked; none of them can be used."""
    asked: list[Settings] = []

    def refuse(settings: Settings, *_: object) -> None:
        asked.append(settings)
        raise UsageError("no server")

    monkeypatch.setattr("mlxroute.cli.session.connect_large", refuse)
    return asked


def test_the_key_stays_that_of_the_first_server_when_a_chat_goes_to_another_one(
    asked: list[Settings],
) -> None:
    for key_server, expected in [(None, "http://a/v1"), ("http://k/v1", "http://k/v1")]:
        session = make_session(replace(SETTINGS, large="http://a/v1", key_server=key_server))
        with pytest.raises(UsageError):
            session.change_large("http://b/v1", None, Console())
        assert (asked[-1].large, asked[-1].key_server) == ("http://b/v1", expected)


def test_a_chat_that_goes_to_another_server_leaves_the_prices_of_the_first_one(
    asked: list[Settings],
) -> None:
    first = replace(SETTINGS, large="http://a/v1")
    with pytest.raises(UsageError):
        make_session(first).change_large("http://b/v1", "huge", Console())
    assert (asked[-1].price_input, asked[-1].price_output) == (None, None)
    assert (asked[-1].large_model, asked[-1].large) == ("huge", "http://b/v1")


def test_each_servers_uploads_cost_what_it_charges(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger()
    prices = Prices(input=10.0, cached_input=10.0, output=0.0)
    catalog = Catalog((Model("big", "none", 0, "me/big", 0, price=prices),), ())
    session = make_session(replace(SETTINGS, large="http://a/v1"), catalog, ledger)

    def connect(settings: Settings, *_: object) -> tuple[ScriptedLarge, None]:
        # The probe is an upload to the new server.
        ledger.record_usage(prompt_tokens=1_000_000, cached_tokens=0, completion_tokens=0)
        if settings.large_model == "none":
            raise UsageError("no server")
        large = ScriptedLarge([b"x"])
        large.model_name = settings.large_model or ""
        return large, None

    monkeypatch.setattr(ScriptedLarge, "close", lambda _: None, raising=False)
    monkeypatch.setattr("mlxroute.cli.session.connect_large", connect)
    monkeypatch.setattr("mlxroute.cli.session.pair_vocabularies", lambda *_: None)
    monkeypatch.setattr("mlxroute.cli.session.make_routing", lambda *_: session.routing)
    ledger.record_usage(prompt_tokens=1_000_000, cached_tokens=0, completion_tokens=0)
    assert session.cost == 2.0
    with pytest.raises(UsageError):
        session.change_large("http://b/v1", "none", Console())
    assert session.cost == 2.0
    # The prices of this one are not known.
    session.change_large("http://b/v1", "huge", Console())
    assert session.cost == 2.0
    session.change_large("http://c/v1", "me/big", Console())
    assert session.cost == 12.0
    assert session.uploads.tokens == 4_000_000
    unknown = make_session(Settings(), ledger=ledger)
    assert unknown.cost is None
