"""What a router learns from the user's own prompts and server."""

from mlxroute.recorded.replies import Replies
from mlxroute.training.calibration import calibrate
from mlxroute.training.head_fitting import FittedHead, fit_head, recall_table
from mlxroute.training.labels import LabelledAnswer, collect_labels

__all__ = [
    "FittedHead",
    "LabelledAnswer",
    "Replies",
    "calibrate",
    "collect_labels",
    "fit_head",
    "recall_table",
]
