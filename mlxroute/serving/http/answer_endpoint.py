"""The endpoint behind the routes: it starts answers, counts them and keeps their documents."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from mlxroute.answers.document import OptionsRecord
from mlxroute.answers.document_file import format_document
from mlxroute.answers.recorded_answer import AnswerOrigin, make_document
from mlxroute.answers.reply_recorder import ReplyRecorder
from mlxroute.answers.router_record import record_router
from mlxroute.closeable import Closeable
from mlxroute.config.setting_choices import ToolPolicyName
from mlxroute.errors import UsageError
from mlxroute.serving.http.answer_store import DEFAULT_STORE_BYTES, AnswerStore
from mlxroute.serving.http.metrics import EndpointMetrics
from mlxroute.serving.http.model_names import ModelNames, ModelRole
from mlxroute.serving.http.parsing.common_fields import AnswerFields
from mlxroute.serving.http.served_answer import ServedAnswer
from mlxroute.serving.http.serving_session import ServingSession
from mlxroute.serving.requests import (
    DEFAULT_CACHE_BYTES,
    AnswerRequest,
    QueueFull,
    SchedulerClosed,
)
from mlxroute.serving.scheduler import AnswerScheduler
from mlxroute.types import Message, Notify, RunStats, no_notice
from mlxroute.types.limits import check_number, shown_value
from mlxroute.view.answer_warnings import AnswerWarnings, common_warnings
from mlxroute.view.figures import format_count

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """Limits of an endpoint.

    Args:
        max_running: Maximum number of answers written at a time. 8 by default.
        max_queued: Maximum number of answers that wait for their turn. 32 by default.
        cache_bytes: Maximum memory of KV caches kept for later prompts. 1 GiB by default.
        store_bytes: Maximum size of the answer documents that are kept. 32 MiB by default.
        keep_alive_s: Seconds of silence after which a stream gets a comment. 10 by default.
        tools: What is done with a request that has tools or a schema. Refused by default.
    """

    max_running: int = 8
    max_queued: int = 32
    cache_bytes: int = DEFAULT_CACHE_BYTES
    store_bytes: int = DEFAULT_STORE_BYTES
    keep_alive_s: float = 10.0
    tools: ToolPolicyName = ToolPolicyName.REFUSE

    def __post_init__(self) -> None:
        """Raise UsageError for a value out of range; `tools` may be given by its name."""
        for name in ("max_running", "max_queued", "cache_bytes"):
            check_number(name, getattr(self, name))
        try:
            object.__setattr__(self, "tools", ToolPolicyName(self.tools))
        except ValueError as exc:
            known = ", ".join(ToolPolicyName)
            raise UsageError(
                f"tools must be one of {known}, not {shown_value(self.tools)}", parameter="tools"
            ) from exc


@dataclass(frozen=True, slots=True)
class EndpointRequest:
    """What an answer is asked for.

    Args:
        fields: The common fields of the request.
        prompt: The conversation, or a text or token ids.
        answer_start: The text of the assistant's turn that the answer continues.
        answer_id: The id of the answer.
        owner: Who may read its document and share its KV cache; "" for everybody.
        completes_reply: Whether its reply has answers already, so that a full queue takes it too.
    """

    fields: AnswerFields
    prompt: Sequence[Message] | str | Sequence[int]
    answer_id: str
    owner: str
    answer_start: str = ""
    completes_reply: bool = False

    @property
    def is_continued(self) -> bool:
        """Whether the prompt is more than a conversation in the chat template."""
        return bool(self.answer_start) or not isinstance(self.prompt[0], dict)


class AnswerEndpoint(Closeable):
    """Answers requests with the models of a session.

    Args:
        session: The models and the options.
        limits: Limits of the endpoint.
        notify: Receives a line about each answer. Default: ignored.

    Attributes:
        session: As given.
        limits: As given.
        names: The ids of the models.
        scheduler: The queue of the answers, and the threads that write them.
        store: The documents of the latest answers.
        metrics: The figures of the endpoint.
        notify: As given.
        forwards: The threads of requests that the large model answers alone.
        scorers: The threads in which prompts are scored.
    """

    def __init__(
        self, session: ServingSession, limits: ServingLimits, *, notify: Notify = no_notice
    ) -> None:
        self.session = session
        self.limits = limits
        self.names = ModelNames(session, created=int(time.time()))
        self.store = AnswerStore(limits.store_bytes)
        self.metrics = EndpointMetrics()
        self.notify = notify
        self.forwards = ThreadPoolExecutor(limits.max_running, "mlxroute-forward")
        # Not the event loop's own threads: answers start in these.
        self.scorers = ThreadPoolExecutor(limits.max_running, "mlxroute-score")
        self._counts: Counter[str] = Counter()
        self._is_closed = False
        self._warnings = AnswerWarnings()
        self.scheduler = AnswerScheduler(
            session.small,
            session.large,
            experience=session.experience,
            max_running=limits.max_running,
            max_queued=limits.max_queued,
            cache_bytes=limits.cache_bytes,
        )
        self.metrics.watch(self.scheduler)

    def start(self, asked: EndpointRequest) -> ServedAnswer:
        """Queue an answer. It encodes the prompt, so that it may take a while.

        Raises QueueFull, SchedulerClosed, UsageError and ContextTooLong.
        """
        session, fields = self.session, asked.fields
        is_local = fields.is_local(session)
        recorder = None if is_local or session.large is None else ReplyRecorder(session.large)
        router = fields.make_router(session)
        router_record = record_router(router, head_sha256=session.small.head_sha256)
        options = session.adapt_options(fields.options)
        running = self.scheduler.submit(
            AnswerRequest(
                asked.prompt,
                router,
                options,
                local_only=is_local,
                exact=fields.exact,
                large=recorder,
                answer_start=asked.answer_start,
                owner=asked.owner,
                completes_reply=asked.completes_reply,
            )
        )
        models = session.model_pair
        origin = AnswerOrigin(
            messages=running.prompt.messages,
            vocabulary=session.small.vocabulary,
            models=replace(models, large=None, large_url=None) if is_local else models,
            router=router_record,
            options=OptionsRecord.of(options),
            id=asked.answer_id,
            prompt_text=running.prompt.text if asked.is_continued else None,
        )
        return ServedAnswer(running, origin, recorder, on_end=partial(self._on_end, asked))

    def forwarding(self) -> AbstractContextManager[None]:
        """Count a request in the block as one that the large model answers alone.

        Raises QueueFull if too many are, SchedulerClosed after `close`. The event loop's thread
        alone may enter it.
        """
        return self._counted("forwarded")

    def scoring(self) -> AbstractContextManager[None]:
        """Count a request in the block as one whose prompts are scored; as `forwarding`."""
        return self._counted("scored")

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        if self._is_closed:
            raise SchedulerClosed
        count = self._counts[what]
        if count >= self.limits.max_running + self.limits.max_queued:
            raise QueueFull(
                f"{format_count(count, 'request')} already being {what}; try again later"
            )
        self._counts[what] += 1
        try:
            yield
        finally:
            self._counts[what] -= 1

    async def run_in(self, threads: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        """Return what `work` returns in one of the threads.

        Raises SchedulerClosed if the endpoint is closed before it begins.
        """
        try:
            future = threads.submit(work)
        except RuntimeError as exc:
            # Otherwise no thread could be started.
            if self._is_closed:
                raise SchedulerClosed from exc
            raise
        task = asyncio.current_task()
        assert task is not None
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # Cancelled by `close`, not with the task that waits for it.
            if self._is_closed and not task.cancelling():
                raise SchedulerClosed from None
            raise

    def close(self) -> None:
        """Cancel all answers and end all threads."""
        self._is_closed = True
        self.scheduler.close()
        for threads in (self.forwards, self.scorers):
            threads.shutdown(wait=False, cancel_futures=True)

    def _on_end(self, asked: EndpointRequest, answer: ServedAnswer) -> None:
        """Count an answer and keep its document."""
        stats = answer.stats
        if stats is None:
            return
        waited_s = answer.running.queue_wait_s
        self.metrics.on_answer(
            asked.fields.role,
            stats,
            answer.tokens,
            queue_wait_s=waited_s,
            has_failed=answer.has_failed,
        )
        document = make_document(
            answer.origin,
            answer.tokens,
            stats,
            prompt_ids=answer.running.prompt.ids,
            recorder=answer.recorder,
        )
        data = format_document(document, redact=self.session.redact)
        self.store.add(asked.answer_id, asked.owner, data)
        self.notify(_describe(asked.fields.role, stats, has_failed=answer.has_failed))
        self.log_warnings(stats)

    def log_warnings(self, stats: RunStats | None = None) -> None:
        """Log the warnings about an answer, each kind once; a forwarded one has no `stats`."""
        session = self.session
        # The log has no text of the conversation.
        warnings = common_warnings(
            stats, large=session.large, small_name=session.small_name, show_names=False
        )
        for line in self._warnings.new_lines(warnings):
            self.notify(f"warning: {line}")


def _describe(role: ModelRole, stats: RunStats, *, has_failed: bool) -> str:
    """Return a line about an answer: what was routed, without any of its text."""
    parts = [
        f"{role}: {stats.prompt_tokens:,} + {format_count(stats.tokens, 'token')}",
        f"{stats.large_tokens:,} from the large model in {format_count(stats.calls, 'call')}",
    ]
    if stats.cached_prompt_tokens:
        parts[0] += f" ({stats.cached_prompt_tokens:,} cached)"
    if stats.unchecked:
        kinds = list(dict.fromkeys(failure.kind for failure in stats.failures))
        kinds += ["withheld"] * bool(stats.withheld)
        parts.append(f"{stats.unchecked:,} unchecked" + (f" ({', '.join(kinds)})" if kinds else ""))
    # One token has no speed.
    if stats.tokens_per_s:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    parts.append(f"ended by {'an error' if has_failed else stats.finish_reason}")
    return ", ".join(parts)
