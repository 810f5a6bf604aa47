"""Values that cross rooms: frozen dataclasses, enums and protocols, standard library only."""

from mlxroute.types.answering import (
    Activity,
    Event,
    Provisional,
    Retracted,
    RunStats,
    Token,
)
from mlxroute.types.callbacks import (
    Notify,
    Progress,
    no_notice,
    no_progress,
)
from mlxroute.types.decoding import (
    BranchCost,
    Judgement,
    LogitFault,
    Message,
    Mode,
    Sampling,
    Signals,
    Source,
    StopReason,
    Vocabulary,
)
from mlxroute.types.escalating import (
    Escalation,
    LargeContext,
    LargeToken,
    Prices,
    Span,
    Uploads,
)
from mlxroute.types.label_kind import (
    LabelKind,
)

__all__ = [
    "Activity",
    "BranchCost",
    "Escalation",
    "Event",
    "Judgement",
    "LabelKind",
    "LargeContext",
    "LargeToken",
    "LogitFault",
    "Message",
    "Mode",
    "Notify",
    "Prices",
    "Progress",
    "Provisional",
    "Retracted",
    "RunStats",
    "Sampling",
    "Signals",
    "Source",
    "Span",
    "StopReason",
    "Token",
    "Uploads",
    "Vocabulary",
    "no_notice",
    "no_progress",
]
