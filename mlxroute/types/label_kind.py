"""Kinds of labels that a head is trained on."""

from __future__ import annotations

from enum import StrEnum


class LabelKind(StrEnum):
    """What a head learns to predict.

    Attributes:
        DIVERGENCE: Whether the models choose different tokens.
        CONSEQUENCE: Whether they do and the outcome of the answer depends on it.
        PREFERENCE: Whether the outcome is right with the large model's token and wrong with the
            small one's (CITER, arXiv 2502.01976, along the large model's answer).
        ADVANTAGE: How much likelier the right outcome is with the large model's token, measured on
            routed answers by sampled continuations.
        DEFERRAL: No labels. The head mixes both models so that the answer becomes likely (Co-LLM,
            arXiv 2403.03870).
    """

    DIVERGENCE = "divergence"
    CONSEQUENCE = "consequence"
    PREFERENCE = "preference"
    ADVANTAGE = "advantage"
    DEFERRAL = "deferral"
