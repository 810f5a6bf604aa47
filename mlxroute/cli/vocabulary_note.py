"""The comparison of the two vocabularies, and the line that says what it showed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxroute.cli.error_advice import error_message
from mlxroute.errors import LargeError
from mlxroute.safe_text import printable

if TYPE_CHECKING:
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.large import LargeModel
    from mlxroute.large.vocabulary.vocabulary_comparison import VocabularyComparison
    from mlxroute.small import SmallModel


def pair_vocabularies(large: LargeModel, small: SmallModel, progress: ByteProgress) -> None:
    """Compare the two vocabularies now rather than at the first escalation."""
    if not large.connected:
        return
    try:
        large.pair_vocabulary(small.vocabulary)
    except LargeError as exc:
        progress.notify(f"warning: {printable(error_message(exc))}; the first call tries again")
        return
    comparison = large.vocabulary_comparison
    assert comparison is not None
    progress.notify(
        describe_vocabularies(
            large.model_name,
            small.name,
            comparison,
            knows_template=large.knows_chat_template,
        )
    )


def describe_vocabularies(
    large_name: str, small_name: str, comparison: VocabularyComparison, *, knows_template: bool
) -> str:
    """Return what is known of the two vocabularies, and what follows from it.

    `knows_template` says whether the large model gets conversations in its own chat template.
    """
    names = f"the vocabularies of {large_name} and {small_name}"
    detail = comparison.detail
    match comparison.is_same:
        case True:
            return f"{names} are the same"
        case False:
            text = f"{names} differ" + (f" (for example, {detail})" if detail else "")
        case None:
            text = f"{names} could not be compared ({detail}), so tokens pass as text"
    if not knows_template:
        text += "; its chat template is not known here, so it gets the small model's"
    return text
