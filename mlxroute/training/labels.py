"""Labels along the large model's own answers: where the small model would have written otherwise.

The large model answers greedily, many tokens a call; the small one reads along and says at each
position what it would write, and in which state (the labels of R2R, arXiv 2505.21600, before any
judge). One file a question is kept, so that nothing is asked twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.engine import generate
from mlxroute.engine.options import MOST_PREFETCHED
from mlxroute.engine.roles import NamedLarge
from mlxroute.questions import Question
from mlxroute.routers import make
from mlxroute.small import SmallModel
from mlxroute.types import Mode, Progress, no_progress

if TYPE_CHECKING:
    import mlx.core as mx

_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """The positions of one answer.

    `hidden` [n, D] are final-norm states in float16, `signals` [n, 4] what a head sees besides
    (see `small.head.signal_features`), `differs` [n] is 1 where the models disagree.
    """

    hidden: mx.array
    signals: mx.array
    differs: mx.array


def collect(
    small: SmallModel,
    large: NamedLarge,
    questions: Sequence[Question],
    *,
    tokens: int,
    folder: Path,
    progress: Progress = no_progress,
) -> list[Labelled]:
    """Label the large model's answers to the questions, from `folder` where they are there.

    Raises LargeError when the large model fails; what was labelled before is kept.
    """
    import mlx.core as mx

    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for done, question in enumerate(questions):
        progress("questions", done, len(questions))
        key = json.dumps([small.name, large.model_name, question.prompt, tokens])
        file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        if not file.exists():
            labelled = _labelled(small, large, question, tokens)
            # Whole or not at all, whenever it is interrupted.
            partial = file.with_suffix(".partial.safetensors")
            mx.save_safetensors(
                str(partial),
                {
                    "hidden": labelled.hidden,
                    "signals": labelled.signals,
                    "differs": labelled.differs,
                },
            )
            partial.rename(file)
        kept = mx.load(str(file))
        assert isinstance(kept, dict)
        found.append(Labelled(**kept))
    return found


def _labelled(small: SmallModel, large: NamedLarge, question: Question, tokens: int) -> Labelled:
    import mlx.core as mx

    answer = generate(
        small,
        large,
        question.prompt,
        router=make("entropy", threshold=-math.inf),
        max_tokens=tokens,
        timeout_s=_TIMEOUT_S,
        strict=True,
        mode=Mode.WAIT,
        prefetch=MOST_PREFETCHED,
    )
    hidden, signals, differs = [], [], []
    for token in answer:
        # Later parts of a large token that the small vocabulary spells are no positions.
        if token.escalation is None:
            continue
        # The step that made these signals is the small model's last one.
        hidden.append(small.hidden_state().astype(mx.float16))
        mx.eval(hidden[-1])
        own = token.signals
        signals.append([own.entropy_nats, own.varentropy, own.top_logprobs[0], own.margin])
        differs.append(float(not token.escalation.agreed))
    return Labelled(mx.stack(hidden), mx.array(signals), mx.array(differs))
