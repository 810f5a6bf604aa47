"""What a training takes and gives: answers, options, held-out figures and the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlxroute.questions.question_files import Question
from mlxroute.recorded.large_answers import LargeAnswer
from mlxroute.types import Message

if TYPE_CHECKING:
    # It imports MLX, which must follow the BLAS that loading a model opens.
    from mlxroute.training.lora_tuning import LoraShape

INTERRUPT: Final = "interrupt"
UNFINISHED: Final = (INTERRUPT, "unfinished")
MAX_EVERY_FIFTH: Final = 500
"""Of more questions than these, as many are held out as of these."""


@dataclass(frozen=True, slots=True)
class WorkedAnswer:
    """A question, the conversation that asks it, and the large model's answer."""

    question: Question
    conversation: Sequence[Message]
    answer: LargeAnswer


@dataclass(frozen=True, slots=True)
class HeldOutFigures:
    """Figures of the held-out answers after some epochs.

    Args:
        round: Number of the on-policy round, 0 before the first.
        epoch: How often each answer was trained on.
        loss: Mean cross-entropy with the large model's choices, in nats a token; each round has
            other held-out tokens.
        accuracy: Share of the questions that the small model answers right.
        updates: Number of updates in the round, which `epoch` gives rounded. 0 (default) before the
            first, and where an earlier version did not write it.
    """

    round: int
    epoch: float
    loss: float
    accuracy: float
    updates: int = 0


@dataclass(frozen=True, slots=True)
class InterruptedRun:
    """An earlier run of the same training that did not end.

    Args:
        figures: Its held-out figures: of rounds that ended, and else up to `best`.
        best: Those of the weights that it kept.
        corrections: Its figures of corrected answers.
        ended_rounds: How many rounds ended before the last one began, the one with number 0 among
            them. 0 by default.
        small_files: The fingerprint of the small model's files; empty (default) if it has none.
        large_record: The SHA-256 of the large model's name in records; empty (default) if it has
            none.
    """

    figures: tuple[HeldOutFigures, ...]
    best: HeldOutFigures
    corrections: tuple[Mapping[str, Any], ...]
    ended_rounds: int = 0
    small_files: str = ""
    large_record: str = ""

    @property
    def place(self) -> str:
        """Where training resumes, in words."""
        if self.best.round or self.ended_rounds:
            return f"after round {self.best.round}"
        return f"round {self.best.round} at epoch {self.best.epoch:g}"

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> InterruptedRun | None:
        """Read the report in an adapter's provenance; None if that run ended.

        Raises ValueError if it is not such a report.
        """
        try:
            if report["ended_by"] not in UNFINISHED:
                return None
            figures = [_read_figures(item) for item in report["figures"]]
            best = _read_figures(report["kept"])
            kept = figures.index(best)
            # Earlier versions did not write it.
            ended = int(report.get("ended_rounds", 0))
            later = [item for item in figures[kept + 1 :] if item.round < ended]
            # The corrections of a round without kept weights are made again.
            corrections = [item for item in report["corrections"] if item["round"] <= best.round]
            return cls(
                (*figures[: kept + 1], *later),
                best,
                tuple(corrections),
                ended,
                small_files=str(report.get("small_files", "")),
                large_record=str(report.get("large_record", "")),
            )
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError("it is not a training report") from exc


def _read_figures(item: Mapping[str, Any]) -> HeldOutFigures:
    return HeldOutFigures(
        int(item["round"]),
        float(item["epoch"]),
        float(item["loss"]),
        float(item["accuracy"]),
        int(item.get("updates", 0)),
    )


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """The settings of one training.

    Args:
        shape: Size of a new adapter.
        rounds: Number of on-policy rounds after the training; 0 by default.
        start: Folder of the adapter that the model was loaded with, which is trained further. None
            (default) for a new one.
        learning_rate: Step size of the optimiser.
        epochs: Maximum number of times that each answer is trained on.
        max_tokens: Maximum length of the small model's own answers.
        interrupted: The run to resume, whose adapter `start` is. None (default) for a new one.
        skip_memory_check: Whether to train even if memory seems too small. False by default.
    """

    shape: LoraShape
    learning_rate: float
    epochs: int
    max_tokens: int
    rounds: int = 0
    start: Path | None = None
    interrupted: InterruptedRun | None = None
    skip_memory_check: bool = False


@dataclass(frozen=True, slots=True)
class TuningOutcome:
    """What a training did.

    Args:
        figures: Held-out figures: before the training, and after about each half epoch.
        best: Those of the weights that were kept; None if none were better than before.
        ended_by: What ended the training: `epochs`, `held-out loss`, `held-out accuracy`,
            `interrupt` or `divergence`; `unfinished` in a
            provenance if nothing did.
        report: All of this and the settings, as in the provenance.
    """

    figures: tuple[HeldOutFigures, ...]
    best: HeldOutFigures | None
    ended_by: str
    report: Mapping[str, Any]
