"""The prices of the settings."""

from __future__ import annotations

import math

from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError
from mlxroute.types import Prices


def read_prices(settings: Settings) -> Prices | None:
    """Return the prices of the settings, None if none is set.

    Cached input costs as much as other input unless it has a price of its own. Raises ConfigError
    for a price that is negative or not finite, and for one without its counterpart.
    """
    prices = (settings.price_input, settings.price_cached_input, settings.price_output)
    if any(price is not None and not 0 <= price < math.inf for price in prices):
        raise ConfigError("a price must be a finite number of at least 0, per million tokens")
    match prices:
        case (None, None, None):
            return None
        case (float(uncached), cached, float(output)):
            return Prices(uncached, uncached if cached is None else cached, output)
        case _:
            raise ConfigError("a cost estimate needs both price_input and price_output")
