"""Two vocabularies brought together: how the answers of the small one go out and come back."""

from __future__ import annotations

from dataclasses import dataclass

from mlxroute.large.dialects import Dialect, with_ids
from mlxroute.large.negotiation.negotiator import NegotiatedDialect, Negotiator
from mlxroute.large.vocabulary.bridge import Bridge
from mlxroute.large.vocabulary.prompt_builder import PromptBuilder
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.types import Vocabulary


@dataclass(frozen=True, slots=True)
class Pairing:
    """How the answers of one small vocabulary go out and come back."""

    vocabulary: Vocabulary
    terms: NegotiatedDialect
    dialect: Dialect
    builder: PromptBuilder
    bridge: Bridge


class Pairings:
    """The `latest` pairing, made anew when the terms or the vocabulary change."""

    def __init__(self, settlement: Negotiator, reader: TokenReader) -> None:
        self._settlement = settlement
        self._reader = reader
        self.latest: Pairing | None = None

    def of(self, vocabulary: Vocabulary) -> Pairing:
        """The pairing with this vocabulary, under terms that are settled. Raises LargeError."""
        settlement, reader, known = self._settlement, self._reader, self.latest
        if (
            known is None
            or known.vocabulary is not vocabulary
            or known.terms is not settlement.terms
        ):
            # What cannot be told now stays so: later answers must not differ from earlier ones.
            same = bool(settlement.shares(vocabulary))
            terms = settlement.terms
            assert terms is not None
            if same and reader.vocabulary is None:
                reader.vocabulary = vocabulary
            dialect = terms.dialect if reader.vocabulary is None else with_ids(terms.dialect)
            known = self.latest = Pairing(
                vocabulary,
                terms,
                dialect,
                PromptBuilder(
                    dialect.form,
                    same_vocabulary=same,
                    tokens=settlement.tokens,
                    replays_fragments=dialect.crashes_on_cached_prompts,
                ),
                Bridge(reader, vocabulary, same_vocabulary=same),
            )
        return known
