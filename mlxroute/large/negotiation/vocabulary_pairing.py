"""A small model's vocabulary paired with the large model: its prompts out, its replies back."""

from __future__ import annotations

from dataclasses import dataclass

from mlxroute.large.dialects import Dialect, with_ids
from mlxroute.large.http.deadline import NextDeadline
from mlxroute.large.negotiation.negotiator import NegotiatedDialect, Negotiator
from mlxroute.large.vocabulary.bridge import Bridge
from mlxroute.large.vocabulary.prompt_builder import PromptBuilder
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.types import Vocabulary


@dataclass(frozen=True, slots=True)
class VocabularyPairing:
    """What turns answers of one small model into prompts, and replies into its tokens.

    `dialect` is the negotiated one, in its most exact form for what is known of the vocabulary.
    `model` is the model name that requests carry, None for no name.
    """

    vocabulary: Vocabulary
    negotiated: NegotiatedDialect
    dialect: Dialect
    model: str | None
    builder: PromptBuilder
    bridge: Bridge


def pair_vocabulary(
    vocabulary: Vocabulary,
    negotiator: Negotiator,
    reader: TokenReader,
    next_deadline: NextDeadline,
) -> VocabularyPairing:
    """Compare a vocabulary with the large model's and pair them. Raises LargeError.

    If they cannot be compared, they count as different for as long as the pairing is used: later
    answers must not differ from earlier ones.
    """
    same = bool(negotiator.is_shared(vocabulary, next_deadline))
    negotiated = negotiator.negotiated
    assert negotiated is not None
    if same and reader.vocabulary is None:
        reader.learn_vocabulary(vocabulary)
    dialect = negotiated.dialect
    if reader.vocabulary is not None:
        dialect = with_ids(dialect)
    builder = PromptBuilder(
        dialect.form,
        same_vocabulary=same,
        tokens=negotiator.tokens,
        replays_fragments=dialect.crashes_on_cached_prompts,
    )
    bridge = Bridge(reader, vocabulary, same_vocabulary=same)
    model = negotiator.model.for_requests(dialect)
    return VocabularyPairing(vocabulary, negotiated, dialect, model, builder, bridge)
