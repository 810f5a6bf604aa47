"""What a router learns from the user's own prompts and server."""

from mlxroute.training.calibration import calibrate
from mlxroute.training.fit import Fitted, fit
from mlxroute.training.labels import collect

__all__ = ["Fitted", "calibrate", "collect", "fit"]
