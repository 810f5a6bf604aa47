"""One answer as the events of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from mlxroute.serving.http.api_error import log_failure, to_api_error
from mlxroute.serving.http.parsing.common_fields import AnswerFields
from mlxroute.serving.http.replies.answer_summary_json import FINISH_REASONS
from mlxroute.serving.http.replies.event_stream import DONE, encode_error, encode_event
from mlxroute.serving.http.replies.reply_forms import ReplyForm
from mlxroute.serving.http.replies.token_logprobs import LogprobForms
from mlxroute.serving.http.served_answer import ServedAnswer
from mlxroute.serving.requests import PromptProgress, ServedEvent
from mlxroute.types import Notify, Provisional, Retracted, Token


class ChunkStream:
    """Turns the events of an answer into chunks.

    Args:
        answer: The answer.
        form: The forms of the chunks.
        fields: What the request says.
        logprobs: The form of logprobs; None without.
        report: Returns the summary and the usage of the complete answer.
        notify: Receives a line about an answer that failed.
    """

    def __init__(
        self,
        answer: ServedAnswer,
        form: ReplyForm,
        fields: AnswerFields,
        *,
        logprobs: LogprobForms | None,
        report: Any,
        notify: Notify,
    ) -> None:
        self._answer = answer
        self._form = form
        self._fields = fields
        self._logprobs = logprobs
        self._report = report
        self._notify = notify
        self._offset = 0

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """Yield the encoded events of the stream."""
        if (first := self._form.first_chunk()) is not None:
            yield encode_event(first)
        try:
            async with aclosing(self._answer.events()) as events:
                async for event in events:
                    if (chunk := self._chunk(event)) is not None:
                        yield encode_event(chunk)
            summary, usage = self._report()
        except Exception as exc:  # noqa: BLE001 - the status was sent already
            log_failure(exc, self._notify)
            yield encode_error(to_api_error(exc, calls=self._answer.calls))
            return
        assert self._answer.stats is not None
        finish_reason = FINISH_REASONS[self._answer.stats.finish_reason]
        yield encode_event(self._form.last_chunk(finish_reason, summary))
        if self._fields.include_usage:
            yield encode_event(self._form.usage_chunk(usage))
        yield DONE

    def _chunk(self, event: ServedEvent) -> dict[str, Any] | None:
        if isinstance(event, Token):
            return self._token_chunk(event)
        if not self._fields.events:
            return None
        match event:
            case Provisional():
                return self._form.event_chunk(
                    {
                        "provisional": {
                            "index": event.index,
                            "text": event.text,
                            "source": event.source,
                        }
                    }
                )
            case Retracted():
                return self._form.event_chunk({"retracted": asdict(event)})
            case PromptProgress():
                return self._form.event_chunk({"prompt": asdict(event)})

    def _token_chunk(self, token: Token) -> dict[str, Any] | None:
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.answer([token], offset=self._offset)
            self._offset += len(token.text)
        elif not token.text:
            return None
        return self._form.text_chunk(token.text, logprobs)
