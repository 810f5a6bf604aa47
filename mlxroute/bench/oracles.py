"""What a router could reach that knows the large model's answers: computed from their labels.

With the first k disagreements of an answer escalated and nothing else, the small model's own
continuation from the next disagreement on is the answer, and the labels hold its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from mlxroute.questions.question_files import Question
from mlxroute.small.mlp_head import MlpHead
from mlxroute.training import LabelledAnswer, recall_table
from mlxroute.types import LabelKind

# Their names in reports.
ORACLES: Final = ("disagreements", "critical_first")


def oracles(
    answers: Sequence[LabelledAnswer],
    questions: Sequence[Question],
    budgets: Sequence[float],
    head: MlpHead | None = None,
) -> dict[str, Any]:
    """Accuracy when exactly the disagreements are escalated, and when the critical ones are.

    The first takes disagreements as they come, as long as the budget lasts, which goes on from
    question to question. The second knows which change the outcome, leaves the others out, and
    spends on the questions that become right for least. Also how well entropy and `head` find the
    critical positions along the large model's answers.
    """
    rights = [a.rights(q) for a, q in zip(answers, questions, strict=True)]
    costs = [_cost(a.outcomes(q), r) for a, q, r in zip(answers, questions, rights, strict=True)]
    tokens = [each.tokens for each in answers]
    critical = [
        a.targets(q, LabelKind.CONSEQUENCE) for a, q in zip(answers, questions, strict=True)
    ]
    return {
        "disagreements": [_in_turn(rights, tokens, budget) for budget in budgets],
        "critical_first": [_cheapest(costs, sum(tokens), budget) for budget in budgets],
        "finding_the_critical": recall_table(answers, critical, head),
    }


def _in_turn(rights: Sequence[Sequence[bool]], tokens: Sequence[int], budget: float) -> Any:
    credit, spent, right = 0.0, 0, 0
    for each, count in zip(rights, tokens, strict=True):
        credit += budget * count
        escalated = min(int(credit), len(each) - 1)
        credit -= escalated
        spent += escalated
        right += each[escalated]
    return _point(budget, spent, sum(tokens), right, len(rights))


def _cost(outcomes: Sequence[str], rights: Sequence[bool]) -> int | None:
    """How many critical disagreements have to be escalated for a right answer; None: in vain."""
    if True not in rights:
        return None
    reached = rights.index(True)
    return sum(outcomes[i] != outcomes[i + 1] for i in range(reached))


def _cheapest(costs: Sequence[int | None], tokens: int, budget: float) -> Any:
    spent, right = 0, 0
    for cost in sorted(each for each in costs if each is not None):
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
