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
from tests.support.scripted_models import ScriptedLarge, ScriptedSmall


@pytest.mark.parametrize(
    ("is_approximate", "has_prices", "mode", "chosen", "ceiling"),
    [
        (False, False, "auto", None, None),
        (False, True, "auto", None, 1.5),
        (False, True, "hedge", None, None),
        (True, False, "auto", None, 1.0),
        (True, True, "auto", None, 1.0),
        (True, False, "hedge", None, 1.0),
        (True, True, "auto", 3.0, 3.0),
        (False, False, "auto", 3.0, 3.0),
    ],
)
def test_the_ceiling_fits_what_a_call_costs(
    is_approximate: bool,
    has_prices: bool,
    mode: str,
    chosen: float | None,
    ceiling: float | None,
) -> None:
    large = ScriptedLarge([b"x"])
    large.is_approximate = is_approximate
    prices = {"price_input": 2.0, "price_output": 8.0} if has_prices else {}
    session = Session(
        ScriptedSmall(b"x"),  # type: ignore[arg-type]
        large,  # type: ignore[arg-type]
        Settings(mode=mode, call_ceiling=chosen, **prices),  # type: ignore[arg-type]
        routing=RoutingRule(
            make_router("entropy", threshold=1.0), ScoreRanks("tiny", "none", 0, {}), has_large=True
        ),
        ledger=Ledger(),
        never_send=(),
    )
    assert session.call_ceiling(parse_mode(mode)) == ceiling
    assert session.options.call_ceiling == ceiling
