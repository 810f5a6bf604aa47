"""An answer that keeps its tokens while it is decoded, and becomes a document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from mlxroute._version import __version__
from mlxroute.answers.document import (
    FORMAT,
    VERSION,
    AnswerDocument,
    AnswerSummary,
    ModelPair,
    OptionsRecord,
    PromptRecord,
    RecordedReply,
    RouterRecord,
)
from mlxroute.answers.reply_recorder import ReplyRecorder
from mlxroute.answers.token_description import describe_token
from mlxroute.engine import Answer
from mlxroute.types import Activity, Event, Message, RunStats, Token, Vocabulary


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class AnswerOrigin:
    """What an answer is made from.

    Args:
        messages: The conversation.
        vocabulary: The small model's vocabulary.
        models: The two models.
        router: The router before the answer.
        options: The options.
        id: Its id in an endpoint; None (default) elsewhere.
        prompt_text: The prompt, if it is more than `messages` in the chat template: of a text
            completion, or of a continued answer. None (default) otherwise.
        created: The time at which it began, in UTC. Now by default.
    """

    messages: Sequence[Message]
    vocabulary: Vocabulary
    models: ModelPair
    router: RouterRecord
    options: OptionsRecord
    id: str | None = None
    prompt_text: str | None = None
    created: datetime = field(default_factory=_now)


class RecordedAnswer:
    """An answer with a record of its tokens; iterate over it as over the answer itself.

    Args:
        answer: The answer.
        origin: What it is made from.
        recorder: The large model that `answer` asks; None if there is none.

    Attributes:
        origin: As given.
        tokens: The committed tokens so far.
    """

    def __init__(
        self, answer: Answer, origin: AnswerOrigin, recorder: ReplyRecorder | None
    ) -> None:
        self._answer = answer
        self.origin = origin
        self._recorder = recorder
        self.tokens: list[Token] = []

    def __iter__(self) -> Iterator[Token]:
        return (event for event in self.events() if isinstance(event, Token))

    def events(self) -> Iterator[Event]:
        """Decode to the end and yield committed tokens, provisional tokens and retractions."""
        for event in self._answer.events():
            if isinstance(event, Token):
                self.tokens.append(event)
            yield event

    def stats(self) -> RunStats:
        """Return the summary so far."""
        return self._answer.stats()

    @property
    def activity(self) -> Activity:
        """What the answer is doing now."""
        return self._answer.activity

    @property
    def prefill_done(self) -> int:
        """Tokens of the prompt that the small model has read."""
        return self._answer.prefill_done

    @property
    def prefill_total(self) -> int:
        """Tokens of the prompt."""
        return self._answer.prefill_total

    def document(self) -> AnswerDocument:
        """Return the document of the answer so far."""
        return make_document(
            self.origin,
            self.tokens,
            self.stats(),
            prompt_ids=self._answer.prompt_ids,
            recorder=self._recorder,
        )


def make_document(
    origin: AnswerOrigin,
    tokens: Sequence[Token],
    stats: RunStats,
    *,
    prompt_ids: Sequence[int],
    recorder: ReplyRecorder | None,
) -> AnswerDocument:
    """Return the document of an answer of which these are the tokens and the figures.

    `recorder` is the large model that it asks; None if there is none.
    """
    token_ids = [token.token_id for token in tokens]
    models = origin.models
    replies: tuple[RecordedReply, ...] = ()
    if recorder is not None:
        # The server's model may be known only once it has been asked.
        models = replace(models, large=recorder.model_name or None)
        replies = recorder.replies(prompt_ids, token_ids)
    return AnswerDocument(
        format=FORMAT,
        version=VERSION,
        mlxroute=__version__,
        created=origin.created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        id=origin.id,
        messages=tuple(origin.messages),
        prompt=PromptRecord(len(prompt_ids), hash_ids(prompt_ids), origin.prompt_text),
        models=models,
        router=origin.router,
        options=origin.options,
        summary=AnswerSummary.of(stats),
        tokens=tuple(describe_token(token, origin.vocabulary) for token in tokens),
        replies=replies,
    )


def hash_ids(token_ids: Sequence[int]) -> str:
    """Return the SHA-256 of ids, written as decimal numbers with commas between them."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()
