"""A saved answer as a picture."""

from __future__ import annotations

from mlxroute.answers.document import AnswerDocument, DocumentToken, TokenDecision
from mlxroute.view.answer_svg import PicturedToken, draw_answer


def draw_document(document: AnswerDocument) -> str:
    """Return a picture of an answer as SVG."""
    summary, models = document.summary, document.models
    small_tokens = summary.tokens - summary.large_tokens
    caption = f"{models.small} wrote {small_tokens:,} of {summary.tokens:,} tokens"
    if models.large is not None:
        caption += f", {models.large} the other {summary.large_tokens:,}"
    tokens = [_picture(token) for token in document.tokens]
    return draw_answer(document.question, tokens, caption=caption)


def _picture(token: DocumentToken) -> PicturedToken:
    if token.decision is TokenDecision.AGREED:
        return PicturedToken(token.text, small_text=token.text)
    if token.decision is TokenDecision.REPLACED and token.small and token.large:
        # Its own text is less where it is a part of the large one or was cut by a stop text.
        chosen = "" if token.large.ends else token.large.text
        return PicturedToken(token.text, small_text=token.small.text, large_text=chosen)
    return PicturedToken(token.text, is_part=token.decision is TokenDecision.CONTINUED)
