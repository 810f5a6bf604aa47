"""The prices of the settings."""

from __future__ import annotations

from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError
from mlxroute.types import Prices
from mlxroute.types.limits import LIMITS, shown_value


def read_prices(settings: Settings) -> Prices | None:
    """Return the prices of the settings, None if none is set.

    Cached input costs as much as other input unless it has a price of its own. Raises ConfigError
    for a price that is negative or not finite, and for one without its counterpart.
    """
    for name in ("price_input", "price_cached_input", "price_output"):
        price = getattr(settings, name)
        if price is not None and not LIMITS[name].accepts(price):
            raise ConfigError(f"{name} must be {LIMITS[name].words}, not {shown_value(price)}")
    match (settings.price_input, settings.price_cached_input, settings.price_output):
        case (None, None, None):
            return None
        case (float(uncached), cached, float(output)):
            return Prices(uncached, uncached if cached is None else cached, output)
        case _:
            raise ConfigError("a cost estimate needs both price_input and price_output")
