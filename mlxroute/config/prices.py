"""The prices of the settings."""

from __future__ import annotations

from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError
from mlxroute.types import Prices


def read_prices(settings: Settings) -> Prices | None:
    """Return the prices of the settings, None if none is set.

    Cached input costs as much as other input unless it has a price of its own. Raises ConfigError
    for a price without its counterpart.
    """
    match (settings.price_input, settings.price_cached_input, settings.price_output):
        case (None, None, None):
            return None
        case (float(uncached), cached, float(output)):
            return Prices(uncached, uncached if cached is None else cached, output)
        case _:
            raise ConfigError("a cost estimate needs both price_input and price_output")
