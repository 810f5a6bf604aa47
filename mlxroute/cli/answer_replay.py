"""A saved answer, ready to be decoded again against its recorded replies."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

from mlxroute.answers.document import AnswerDocument, OptionsRecord
from mlxroute.answers.recorded_answer import AnswerOrigin, RecordedAnswer, hash_ids
from mlxroute.answers.replayed_large import ReplayedLarge
from mlxroute.answers.reply_recorder import ReplyRecorder
from mlxroute.answers.router_record import record_router, restore_router
from mlxroute.cli.routing import HEAD_ROUTER, find_ranks
from mlxroute.config import Settings
from mlxroute.engine import generate
from mlxroute.errors import UsageError
from mlxroute.routers import Router, make_router
from mlxroute.tokenizers.template_sandbox import at_time
from mlxroute.types import Mode, StopReason

if TYPE_CHECKING:
    from mlxroute.small import SmallModel


def prepare_replay(
    document: AnswerDocument,
    small: SmallModel,
    settings: Settings,
    *,
    budget: float | None,
    threshold: float | None,
    mode: Mode | None,
) -> RecordedAnswer:
    """Return the answer of a document, to be decoded again without calls.

    `budget`, `threshold` and `mode` replace the recorded ones unless they are None. Raises
    UsageError if the small model reads the prompt otherwise than the recorded one, and for an
    answer without tokens or with tokens that spell the key.
    """
    if document.prompt.text is not None:
        raise UsageError("the answer continues a text, not a conversation, and cannot be replayed")
    if any(token.id < 0 for token in document.tokens):
        raise UsageError("the answer spells the key, which is not saved, so it cannot be replayed")
    options = _choose_options(document, mode)
    created = _read_time(document.created)
    # A chat template may write the date.
    with at_time(created.astimezone().replace(tzinfo=None)):
        prompt_ids = _encode_prompt(document, small)
        router = _choose_router(document, small, settings, budget=budget, threshold=threshold)
        recorder = ReplyRecorder(ReplayedLarge(document, prompt_tokens=len(prompt_ids)))
        answer = generate(
            small,
            recorder,
            document.messages,
            router=router,
            max_tokens=options.max_tokens,
            stop=options.stop,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=options.seed,
            mode=options.mode,
            prefetch=options.prefetch,
            call_ceiling=options.call_ceiling,
            accept_within=options.accept_within,
        )
    origin = AnswerOrigin(
        messages=document.messages,
        vocabulary=small.vocabulary,
        models=replace(document.models, small=small.name, small_files=small.fingerprint or None),
        router=record_router(router, head_sha256=small.head_sha256),
        options=options,
        created=created,
    )
    return RecordedAnswer(answer, origin, recorder)


def describe_other_files(recorded: AnswerDocument, replayed: AnswerOrigin) -> list[str]:
    """Return which files of the small model and its router are not those of the recorded answer.

    A document of an earlier version does not say which they were.
    """
    before, after = recorded.models, replayed.models
    lines = []
    # The names in documents of an endpoint are without folders.
    if PurePath(before.small).name != PurePath(after.small).name:
        lines.append(f"the answer is from {before.small}, and {after.small} decodes it again")
    elif before.small_files and after.small_files not in (None, before.small_files):
        lines.append(f"the files of {after.small} may have changed since the answer")
    head = recorded.router.head_sha256
    if head and replayed.router.head_sha256 != head:
        lines.append(
            "the head is not that of the answer, so other positions may be escalated; name that"
            " one with --head FILE"
        )
    return lines


def is_stopped(document: AnswerDocument) -> bool:
    """Return whether an answer was stopped, by its reader or by a failure, before its end."""
    return document.summary.finish_reason is StopReason.CANCELLED


def _choose_options(document: AnswerDocument, mode: Mode | None) -> OptionsRecord:
    """Return the recorded options, in another mode if one is given.

    A stopped answer has no replies beyond its end: its length is the limit. Raises UsageError if it
    has no tokens.
    """
    options = document.options
    if is_stopped(document):
        if not document.tokens:
            raise UsageError(
                "the answer was stopped before its first token, so there is nothing to replay"
            )
        options = replace(options, max_tokens=len(document.tokens))
    return options if mode is None else replace(options, mode=mode)


def _read_time(created: str) -> datetime:
    """Return the time of a document. Raises UsageError."""
    try:
        time = datetime.fromisoformat(created)
        # The first and the last day of the calendar have no time in every zone.
        time.astimezone()
        return time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError("created is not a time, such as 2026-01-02T12:00:00.250Z") from None


def _encode_prompt(document: AnswerDocument, small: SmallModel) -> tuple[int, ...]:
    """Return the ids of the prompt.

    Raises UsageError if they are not the recorded ones, or if the replies have unknown tokens.
    """
    prompt_ids = small.encode_conversation(document.messages).ids
    if hash_ids(prompt_ids) != document.prompt.sha256:
        raise UsageError(
            f"{small.name} reads the prompt as {len(prompt_ids):,} other tokens than those recorded"
            f" ({document.prompt.tokens:,}), so the replies do not fit"
        )
    _check_reply_ids(document, small)
    return prompt_ids


def _check_reply_ids(document: AnswerDocument, small: SmallModel) -> None:
    """Raise UsageError for a recorded token that the small model does not have."""
    ids = (i for reply in document.replies for token in reply.tokens for i in token.ids)
    size = small.vocabulary.size
    unknown = next((token_id for token_id in ids if not 0 <= token_id < size), None)
    if unknown is not None:
        raise UsageError(
            f"a recorded reply has the token id {unknown}, and {small.name} has only those below"
            f" {size}"
        )


def _choose_router(
    document: AnswerDocument,
    small: SmallModel,
    settings: Settings,
    *,
    budget: float | None,
    threshold: float | None,
) -> Router:
    """Return the recorded router in its recorded state, or one at another threshold or budget."""
    recorded = restore_router(document.router)
    if recorded.name != HEAD_ROUTER and budget is None and threshold is None:
        return recorded
    # For a learned head, this loads it.
    ranks = find_ranks(small, recorded.name, settings.head)
    if threshold is not None:
        return make_router(recorded.name, threshold=threshold)
    if budget is not None:
        return make_router(recorded.name, budget=budget, quantiles=ranks[recorded.name])
    return recorded
