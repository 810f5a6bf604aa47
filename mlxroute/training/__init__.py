"""What a router learns from the user's own prompts and server."""

from mlxroute.recorded.replies import Replies
from mlxroute.training.calibration import calibrate
from mlxroute.training.head_fitting import Fitted, fit, recall_table
from mlxroute.training.labels import Labelled, collect

__all__ = ["Fitted", "Labelled", "Replies", "calibrate", "collect", "fit", "recall_table"]
