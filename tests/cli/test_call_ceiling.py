"""The default of `--call-ceiling`, by what a call costs."""

from __future__ import annotations

import pytest

from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.routing import RoutingRule
from mlxroute.cli.session import Session
from mlxroute.config import Settings
from mlxroute.engine import parse_mode
from mlxroute.ledger import Ledger
from mlxroute.routers import make_router
from mlxroute.types import Prices
from tests.support.fakes import ScriptedLarge, ScriptedSmall

PRICES = Prices(input=2.0, cached_input=0.5, output=8.0)


@pytest.mark.parametrize(
    ("is_approximate", "prices", "mode", "chosen", "ceiling"),
    [
        (False, None, "auto", None, None),
        (False, PRICES, "auto", None, 1.5),
        (False, PRICES, "hedge", None, None),
        (True, None, "auto", None, 1.0),
        (True, PRICES, "auto", None, 1.0),
        (True, None, "hedge", None, 1.0),
        (True, PRICES, "auto", 3.0, 3.0),
        (False, None, "auto", 3.0, 3.0),
    ],
)
def test_the_ceiling_fits_what_a_call_costs(
    is_approximate: bool,
    prices: Prices | None,
    mode: str,
    chosen: float | None,
    ceiling: float | None,
) -> None:
    large = ScriptedLarge([b"x"])
    large.is_approximate = is_approximate
    session = Session(
        ScriptedSmall(b"x"),  # type: ignore[arg-type]
        large,  # type: ignore[arg-type]
        Settings(mode=mode, call_ceiling=chosen),
        routing=RoutingRule(
            make_router("entropy", threshold=1.0), ScoreRanks("tiny", "none", 0, {}), has_large=True
        ),
        ledger=Ledger(),
        never_send=(),
        prices=prices,
    )
    assert session.call_ceiling(parse_mode(mode)) == ceiling
    assert session.options.call_ceiling == ceiling
