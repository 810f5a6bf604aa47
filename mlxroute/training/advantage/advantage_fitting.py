"""Heads fitted to advantages, and the choice among them by the accuracy of routed answers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import Question
from mlxroute.recorded.large_answers import LargeAnswer
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.small.mlp_head import MlpHead
from mlxroute.statistics import mcnemar_p
from mlxroute.training.advantage.advantage_labels import (
    SAMPLES,
    AdvantageLabeller,
    AdvantageLabels,
)
from mlxroute.training.advantage.routed_answers import (
    BudgetedRouter,
    RoutedFigures,
    measure_routed_accuracy,
)
from mlxroute.training.advantage.shrinkage import shrink_advantages
from mlxroute.training.head_fitting import (
    HELD_OUT_STRIDE,
    MIN_ANSWERS,
    FittedHead,
    LabelledPair,
    fit_shape,
    judge_shapes,
    rank_quantiles,
)
from mlxroute.training.head_shapes import Positions
from mlxroute.training.judged_questions import JudgedQuestion, judge_questions
from mlxroute.training.labels import LabelledAnswer, to_list
from mlxroute.types import LabelKind, Progress

# Heads that are compared by routed accuracy.
_CANDIDATES: Final = 3
_HEAD: Final = "head"
_ENTROPY: Final = "entropy"


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A fitted head, with its scores at evenly spaced ranks and its held-out figures."""

    shape: str
    head: MlpHead
    quantiles: tuple[float, ...]
    figures: RoutedFigures


@dataclass(frozen=True, slots=True)
class AdvantageTraining:
    """One training with advantage labels.

    Args:
        small: The small model.
        large: The large model and its recorded tokens.
        ranks: The small model's calibrated scores.
        router: The router that writes the answers to label; its budget is also that of the heads.
        max_tokens: Maximum length of an answer.
        folder: Folder of the label files.
        at_once: Maximum number of calls in flight.
        progress: Receives how many answers are labelled, and written with each head.
        on_answers: Receives the large model's answers to questions without a right answer; does
            nothing by default.
    """

    small: SmallModel
    large: RecordingLarge
    ranks: ScoreRanks
    router: BudgetedRouter
    max_tokens: int
    folder: Path
    at_once: int
    progress: Progress
    on_answers: Callable[[Sequence[LargeAnswer]], None] = lambda answers: None

    def run(
        self,
        questions: Sequence[Question],
        *,
        examples: Sequence[Question],
        provenance: Mapping[str, Any],
    ) -> FittedHead:
        """Label the answers to four fifths of the questions, fit heads, and judge by the others.

        `examples` are worked examples that precede each question; `provenance` is added to the
        report. The small model has the head with the highest accuracy afterwards. Raises UsageError
        for fewer than ten questions whose right answer is known and for labels without a difference
        to learn, LargeError if the large model fails.
        """
        judged = self._judge(questions, examples)
        held_out = judged[::HELD_OUT_STRIDE]
        fitted = [item for index, item in enumerate(judged) if index % HELD_OUT_STRIDE]
        labels = self._label(fitted)
        pairs = make_pairs(labels)
        candidates = self._measure_candidates(pairs, held_out)
        best = max(candidates, key=lambda item: (item.figures.right, -item.figures.large_tokens))
        entropy = self._measure(
            held_out, BudgetedRouter.entropy(self.ranks, self.router.budget), label=_ENTROPY
        )
        self.small.set_head(best.head)
        report = {
            **provenance,
            "labels": str(LabelKind.ADVANTAGE),
            "written_by": {"router": self.router.name, "budget": self.router.budget},
            "shape": best.shape,
            "answers": {"fitted": len(fitted), "held_out": len(held_out)},
            "unjudged": len(questions) - len(judged),
            **_describe_labels(labels, pairs),
            "routed": _report_routed(best, candidates, entropy, held_out, self.router.budget),
        }
        fingerprints = tuple(question.fingerprint for question in questions)
        beats_entropy = best.figures.right > entropy.right
        return FittedHead(best.head, report, best.quantiles, fingerprints, beats_entropy)

    def _judge(
        self, questions: Sequence[Question], examples: Sequence[Question]
    ) -> list[JudgedQuestion]:
        """Return the questions whose right answer is known. Raises UsageError for too few."""
        _check_count(len(questions), "")
        judged = judge_questions(
            self.small,
            self.large,
            questions,
            examples=examples,
            max_tokens=self.max_tokens,
            at_once=self.at_once,
            on_answers=self.on_answers,
        )
        _check_count(len(judged), " that can be judged")
        return judged

    def _label(self, questions: Sequence[JudgedQuestion]) -> list[AdvantageLabels]:
        labeller = AdvantageLabeller(
            self.small,
            self.large,
            self.router,
            max_tokens=self.max_tokens,
            folder=self.folder,
            at_once=self.at_once,
        )
        labels = labeller.label(questions, progress=self.progress)
        # A server that cannot continue an answer at all leaves no position.
        return [item for item in labels if item.differs.size]

    def _measure_candidates(
        self, pairs: Sequence[LabelledPair], held_out: Sequence[JudgedQuestion]
    ) -> list[_Candidate]:
        """Fit the shapes with the highest estimated gain, and let each head write answers."""
        gains = judge_shapes(pairs, _squared_loss, self._estimate_gain)
        positions = Positions.of(pairs)
        candidates = []
        for shape in sorted(gains, key=lambda name: -gains[name])[:_CANDIDATES]:
            head = fit_shape(pairs, _squared_loss, shape)
            quantiles = rank_quantiles(positions.score(head))
            self.small.set_head(head)
            router = BudgetedRouter(_HEAD, self.router.budget, quantiles)
            figures = self._measure(held_out, router, label=f"{_HEAD}, {shape}")
            candidates.append(_Candidate(shape, head, quantiles, figures))
        return candidates

    def _estimate_gain(self, positions: Positions, scores: Sequence[float]) -> float:
        """Return the sum of the advantages where the scores are highest, within the budget."""
        targets = to_list(positions.targets)
        count = round(self.router.budget * len(scores))
        return sum(targets[i] for i in sorted(range(len(scores)), key=lambda i: -scores[i])[:count])

    def _measure(
        self, questions: Sequence[JudgedQuestion], router: BudgetedRouter, *, label: str
    ) -> RoutedFigures:
        return measure_routed_accuracy(
            self.small,
            self.large,
            questions,
            router,
            max_tokens=self.max_tokens,
            label=f"answers by {label}",
            progress=self.progress,
        )


def _check_count(count: int, kind: str) -> None:
    if count < MIN_ANSWERS:
        raise UsageError(
            f"a head needs at least {MIN_ANSWERS} answers{kind}, not {count}; give more questions"
        )


def make_pairs(labels: Sequence[AdvantageLabels]) -> list[LabelledPair]:
    """Return the answers with the targets of their positions, of unit deviation.

    The target is the shrunk advantage, and 0 where the models agree: there an escalation changes
    nothing. Of an answer with more disagreements than were continued, the others are left out, and
    the same share of the positions where the models agree. Raises UsageError if all targets are
    equal.
    """
    counts = [answer.counts() for answer in labels]
    advantages = iter(shrink_advantages([item for group in counts for item in group.values()]))
    known = [{position: next(advantages) for position in group} for group in counts]
    kept = [
        _thin(answer, group, seed=number)
        for number, (answer, group) in enumerate(zip(labels, known, strict=True))
    ]
    targets = [
        [group.get(position, 0.0) for position in positions]
        for group, positions in zip(known, kept, strict=True)
    ]
    deviation = statistics.pstdev([value for group in targets for value in group] or [0.0])
    if not deviation:
        raise UsageError(
            "the advantage labels are all 0: the large model's tokens help no more than chance;"
            " give more questions"
        )
    return [
        (_as_labelled(answer, positions), [value / deviation for value in group])
        for answer, positions, group in zip(labels, kept, targets, strict=True)
    ]


def _thin(answer: AdvantageLabels, known: Mapping[int, float], *, seed: int) -> list[int]:
    """Return the positions to fit to: those that are known, and as large a share of the agreed."""
    differs = [bool(value) for value in to_list(answer.differs)]
    agreed = [position for position, differing in enumerate(differs) if not differing]
    count = round(len(agreed) * len(known) / sum(differs)) if any(differs) else len(agreed)
    return sorted([*known, *random.Random(seed).sample(agreed, count)])


def _as_labelled(answer: AdvantageLabels, positions: Sequence[int]) -> LabelledAnswer:
    """Return some positions of an answer in the form that heads are fitted to."""
    rows = mx.array(list(positions), dtype=mx.int32)
    return LabelledAnswer(
        hidden=answer.hidden[rows],
        features=answer.features[rows],
        differs=answer.differs[rows],
        logprobs=mx.zeros((len(positions), 2)),
        text=answer.text,
        token_count=len(positions),
    )


def _squared_loss(outputs: mx.array, targets: mx.array, logprobs: mx.array) -> mx.array:
    """Return the squared differences of outputs [..., B] and targets [B]."""
    return mx.square(outputs - targets)


def _describe_labels(
    labels: Sequence[AdvantageLabels], pairs: Sequence[LabelledPair]
) -> dict[str, Any]:
    """Return the counts of positions, and the mean difference that an escalation makes."""
    counts = [item for answer in labels for item in answer.counts().values()]
    positions = sum(answer.differs.size for answer in labels)
    differing = sum(sum(to_list(answer.differs)) for answer in labels)
    return {
        "positions": {"written": positions, "fitted": sum(len(targets) for _, targets in pairs)},
        "differing": round(differing / positions, 4),
        "continued": {"disagreements": len(counts), "samples": SAMPLES},
        "mean_advantage": round(sum(item.difference for item in counts) / len(counts), 4),
    }


def _report_routed(
    best: _Candidate,
    candidates: Sequence[_Candidate],
    entropy: RoutedFigures,
    questions: Sequence[JudgedQuestion],
    budget: float,
) -> dict[str, Any]:
    """Return the accuracy of the head and of entropy on the same questions, and of all heads."""
    pairs = list(zip(best.figures.is_right, entropy.is_right, strict=True))
    only_head, only_entropy = pairs.count((True, False)), pairs.count((False, True))
    judges = {"answers" if item.large_outcome is None else "large model" for item in questions}
    return {
        "budget": budget,
        "judged_by": " and ".join(sorted(judges)),
        _HEAD: _figures(best.figures),
        _ENTROPY: _figures(entropy),
        "only_head": only_head,
        "only_entropy": only_entropy,
        "p": float(f"{mcnemar_p(only_head, only_entropy):.3g}"),
        "candidates": {item.shape: _figures(item.figures) for item in candidates},
    }


def _figures(figures: RoutedFigures) -> dict[str, float]:
    count = len(figures.is_right)
    return {
        "accuracy": round(figures.right / count, 4),
        "large_tokens_per_question": round(figures.large_tokens / count, 4),
        "escalation_rate": round(figures.large_tokens / max(1, figures.tokens), 5),
    }
