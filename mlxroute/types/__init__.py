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
    OnFailure,
    Progress,
    ignore_failure,
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
    CallFailure,
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
from mlxroute.types.prompt_text import (
    EncodedPrompt,
    PromptText,
)

__all__ = [
    "Activity",
    "BranchCost",
    "CallFailure",
    "EncodedPrompt",
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
    "OnFailure",
    "Prices",
    "Progress",
    "PromptText",
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
    "ignore_failure",
    "no_notice",
    "no_progress",
]
