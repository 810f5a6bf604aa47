"""Oracles: routers that know the large model's answers, or the right ones."""

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
    """Return the accuracy of three oracle routers within each budget, and the recall of scores.

    All choose among texts that were written: the large model's first k tokens that differ are
    taken, then the small model goes on alone.

    - `disagreements` escalates each disagreement while the budget lasts; what is left of a budget
      carries over to the next question.
    - `large_outcome` spends the fewest large tokens to reach the large model's own outcome, first
      in the questions that need the fewest. It does not know the right answer, so its ceiling is
      the large model's accuracy.
    - `gold` knows the right answer: it escalates the disagreements that change the outcome up to
      the first k whose text is right. With several tries on a few choices, some are right by luck,
      also where the large model is wrong, so it exceeds the large model.

    `finding_the_critical` is the share of the disagreements that change the outcome that entropy
    and `head` find. The oracles are this project's own definitions.
    """
    pairs = list(zip(answers, questions, strict=True))
    correct = [answer.find_correct(question) for answer, question in pairs]
    outcomes = [answer.find_outcomes(question) for answer, question in pairs]
    tokens = [answer.token_count for answer in answers]
    critical = [answer.make_targets(question, LabelKind.CONSEQUENCE) for answer, question in pairs]
    large_steps = [
        _step_to_large(texts, rights) for texts, rights in zip(outcomes, correct, strict=True)
    ]
    gold_steps = [
        _step_to_gold(texts, rights) for texts, rights in zip(outcomes, correct, strict=True)
    ]
    alone = sum(rights[0] for rights in correct)
    return {
        "disagreements": [_escalate_in_order(correct, tokens, budget) for budget in budgets],
        "large_outcome": [_take_cheapest(large_steps, alone, tokens, b) for b in budgets],
        "gold": [_take_cheapest(gold_steps, alone, tokens, b) for b in budgets],
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
    return _point(budget, spent, tokens, right)


def _step_to_large(outcomes: Sequence[str], correct: Sequence[bool]) -> tuple[int, int]:
    """Return the fewest large tokens that reach the large model's outcome, and the gain.

    The gain is 1 where that makes a wrong answer right, -1 where it makes a right one wrong, else
    0.
    """
    count = outcomes.index(outcomes[-1])
    return count, correct[-1] - correct[0]


def _step_to_gold(outcomes: Sequence[str], correct: Sequence[bool]) -> tuple[int, int]:
    """Return the critical disagreements before the first right text, and the gain, 0 or 1."""
    if True not in correct:
        return 0, 0
    first_right = correct.index(True)
    count = sum(outcomes[i] != outcomes[i + 1] for i in range(first_right))
    return count, 1 - correct[0]


def _take_cheapest(
    steps: Sequence[tuple[int, int]], alone: int, tokens: Sequence[int], budget: float
) -> dict[str, float]:
    """Return the point of a router that takes the steps with the fewest large tokens first.

    `alone` is how many answers are right without any step. Steps of equal size are taken in the
    order of the questions.
    """
    spent, right = 0, alone
    for count, gain in sorted(steps, key=lambda step: step[0]):
        if spent + count > budget * sum(tokens):
            break
        spent, right = spent + count, right + gain
    return _point(budget, spent, tokens, right)


def _point(budget: float, spent: int, tokens: Sequence[int], right: int) -> dict[str, float]:
    return {
        "budget": budget,
        "escalation_rate": round(spent / sum(tokens), 5),
        "large_tokens_per_question": round(spent / len(tokens), 4),
        "accuracy": round(right / len(tokens), 4),
    }
