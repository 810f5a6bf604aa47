"""Many routed answers at a time: their queue, their common decode steps and their KV caches."""

from mlxroute.serving.requests import AnswerRequest, PromptProgress, QueueFull, SchedulerClosed
from mlxroute.serving.running_answer import RunningAnswer
from mlxroute.serving.scheduler import AnswerScheduler, SchedulerFigures

__all__ = [
    "AnswerRequest",
    "AnswerScheduler",
    "PromptProgress",
    "QueueFull",
    "RunningAnswer",
    "SchedulerClosed",
    "SchedulerFigures",
]
