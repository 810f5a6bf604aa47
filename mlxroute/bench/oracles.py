"""Upper bounds: the accuracy of routers that know the large model's answers, from labels.

An oracle escalates the first k disagreements of an answer and nothing else. The answer is then the
large model's text up to the next disagreement, and the small model's continuation from there. The
labels contain that text for every k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxroute.questions.question_files import Question
from mlxroute.small.mlp_head import MlpHead
from mlxroute.training.head_fitting import recall_table
from mlxroute.training.labels import LabelledAnswer
from mlxroute.types import LabelKind


def compute_oracles(
    answers: Sequence[LabelledAnswer],
    questions: Sequence[Question],
    budgets: Sequence[float],
    head: MlpHead | None = None,
) -> dict[str, Any]:
    """Return the accuracy of two oracle routers within each budget, and the recall of scores.

    `disagreements` in the report is an oracle that escalates each disagreement while the budget
    lasts; what is left of a budget carries over to the next question. `critical_first` is one that
    escalates only disagreements that change the outcome, first in the questions that need the
    fewest. `finding_the_critical` is the share of these disagreements that entropy and `head` find.

    Both oracles are this project's own definitions.
    """
    pairs = list(zip(answers, questions, strict=True))
    correct = [answer.find_correct(question) for answer, question in pairs]
    costs = [
        _escalations_needed(answer.find_outcomes(question), right)
        for (answer, question), right in zip(pairs, correct, strict=True)
    ]
    tokens = [answer.token_count for answer in answers]
    critical = [answer.make_targets(question, LabelKind.CONSEQUENCE) for answer, question in pairs]
    return {
        "disagreements": [_escalate_in_order(correct, tokens, budget) for budget in budgets],
        "critical_first": [_escalate_cheapest(costs, sum(tokens), budget) for budget in budgets],
        "finding_the_critical": recall_table(answers, critical, head),
    }


def _escalate_in_order(
    correct: Sequence[Sequence[bool]], tokens: Sequence[int], budget: float
) -> dict[str, float]:
    """Return the point of a router that escalates every disagreement while the budget lasts.

    `correct[i][k]` is whether answer i is right with its first k disagreements escalated.
    """
    credit, spent, right = 0.0, 0, 0
    for answer_correct, count in zip(correct, tokens, strict=True):
        credit += budget * count
        escalated = min(int(credit), len(answer_correct) - 1)
        credit -= escalated
        spent += escalated
        right += answer_correct[escalated]
    return _point(budget, spent, sum(tokens), right, len(correct))


def _escalations_needed(outcomes: Sequence[str], correct: Sequence[bool]) -> int | None:
    """Return how many critical disagreements a right answer needs; None if it stays wrong."""
    if True not in correct:
        return None
    first_right = correct.index(True)
    return sum(outcomes[i] != outcomes[i + 1] for i in range(first_right))


def _escalate_cheapest(costs: Sequence[int | None], tokens: int, budget: float) -> dict[str, float]:
    """Return the point of a router that escalates for the questions with the lowest costs."""
    spent, right = 0, 0
    for cost in sorted(cost for cost in costs if cost is not None):
        if spent + cost > budget * tokens:
            break
        spent, right = spent + cost, right + 1
    return _point(budget, spent, tokens, right, len(costs))


def _point(budget: float, spent: int, tokens: int, right: int, count: int) -> dict[str, float]:
    return {
        "budget": budget,
        "escalation_rate": round(spent / tokens, 5),
        "accuracy": round(right / count, 4),
    }
