"""What a router learns from the user's own prompts and server."""

from mlxroute.training.calibration import calibrate

__all__ = ["calibrate"]
