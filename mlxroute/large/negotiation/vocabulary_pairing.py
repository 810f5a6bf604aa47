"""A small vocabulary paired with the large model: a prompt builder and a bridge for replies."""

from __future__ import annotations

from dataclasses import dataclass

from mlxroute.large.dialects import Dialect, prefer_ids
from mlxroute.large.dialects.tokenize_routes import TokenizeRoutes
from mlxroute.large.http.deadline import NextDeadline
from mlxroute.large.negotiation.negotiator import NegotiatedDialect, Negotiator
from mlxroute.large.prompt import PromptForm
from mlxroute.large.vocabulary.bridge import Bridge
from mlxroute.large.vocabulary.prompt_builder import PromptBuilder
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.large.vocabulary.vocabulary_comparison import VocabularyComparison
from mlxroute.types import Vocabulary


@dataclass(frozen=True, slots=True)
class VocabularyPairing:
    """The prompt builder and the bridge for one small vocabulary.

    `dialect` is the negotiated one, or its variant for a known large vocabulary (`prefer_ids`).
    `model` is the model name that requests carry, None for no name.
    """

    vocabulary: Vocabulary
    comparison: VocabularyComparison
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
    comparison = negotiator.compare(vocabulary, next_deadline)
    same = bool(comparison.is_same)
    negotiated = negotiator.negotiated
    assert negotiated is not None
    if same and reader.vocabulary is None:
        reader.learn_vocabulary(vocabulary)
    dialect = negotiated.dialect
    if reader.vocabulary is not None:
        dialect = prefer_ids(dialect)
    tokens = negotiator.bind(negotiator.tokens, next_deadline)
    needs_ids = dialect.form is PromptForm.IDS and not same
    builder = PromptBuilder(
        dialect.form,
        same_vocabulary=same,
        tokens=negotiator.tokens,
        replays_fragments=dialect.crashes_on_cached_prompts,
        renders_conversations=not (
            needs_ids and isinstance(tokens, TokenizeRoutes) and not tokens.takes_messages()
        ),
    )
    bridge = Bridge(reader, vocabulary, same_vocabulary=same)
    model = negotiator.model.for_requests(dialect)
    return VocabularyPairing(vocabulary, comparison, negotiated, dialect, model, builder, bridge)
