"""The routes: each reads a request, has it answered, and writes the reply."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlxroute.errors import ContextTooLong
from mlxroute.serving.http.answer_endpoint import AnswerEndpoint, EndpointRequest
from mlxroute.serving.http.api_error import ApiError, log_failure, to_api_error, wrong
from mlxroute.serving.http.forwarding import forward_chat
from mlxroute.serving.http.metrics import CONTENT_TYPE, count_request
from mlxroute.serving.http.model_names import ModelRole
from mlxroute.serving.http.parsing.chat_fields import ToolsNeeded, read_chat
from mlxroute.serving.http.parsing.common_fields import AnswerFields
from mlxroute.serving.http.parsing.prompt_fields import PromptFields, read_completion
from mlxroute.serving.http.parsing.request_body import read_json
from mlxroute.serving.http.replies.answer_summary_json import FINISH_REASONS, summarize, usage
from mlxroute.serving.http.replies.chunk_stream import ChunkStream
from mlxroute.serving.http.replies.event_stream import ClientGone, EventStream, unless_gone
from mlxroute.serving.http.replies.reply_forms import ID_HEADER, ReplyForm
from mlxroute.serving.http.replies.token_logprobs import LogprobForms
from mlxroute.serving.http.served_answer import ServedAnswer
from mlxroute.serving.requests import QueueFull, ScoredPrompt

_CLIENT_GONE_STATUS: Final = 499
Handler = Callable[[Request], Awaitable[Response]]


def endpoint_of(request: Request) -> AnswerEndpoint:
    """Return the endpoint. Raises ApiError while the models are being loaded."""
    endpoint: AnswerEndpoint | None = request.app.state.endpoint
    if endpoint is None:
        raise ApiError(503, "the models are being loaded", code="loading", retry_after_s=5)
    return endpoint


def route(handler: Handler) -> Handler:
    """Return a handler that replies errors in the API's form and counts requests."""

    @wraps(handler)
    async def handle(request: Request) -> Response:
        try:
            response = await handler(request)
        except ClientGone:
            response = Response(status_code=_CLIENT_GONE_STATUS)
        except Exception as exc:  # noqa: BLE001 - no traceback may reach a client
            log_failure(exc, request.app.state.notify)
            response = to_api_error(exc).response()
        count_request(request.app, handler.__name__, response.status_code)
        return response

    return handle


@route
async def health(request: Request) -> Response:
    """Reply 200 while requests are answered, 503 before and after a failure of all decoding."""
    if endpoint_of(request).scheduler.has_failed:
        raise ApiError(503, "decoding has failed; restart the endpoint", code="failed")
    return JSONResponse({"status": "ok"})


@route
async def metrics(request: Request) -> Response:
    """Reply the figures in Prometheus' text format."""
    return Response(endpoint_of(request).metrics.text(), media_type=CONTENT_TYPE)


@route
async def models(request: Request) -> Response:
    """Reply the list of models."""
    return JSONResponse(endpoint_of(request).names.describe_all())


@route
async def model(request: Request) -> Response:
    """Reply the entry of one model."""
    names = endpoint_of(request).names
    return JSONResponse(names.describe(names.role(request.path_params["model"])))


@route
async def answer_document(request: Request) -> Response:
    """Reply the document of an answer."""
    store, owner = endpoint_of(request).store, request.state.owner
    data = store.find(request.path_params["answer_id"], owner)
    if data is None:
        raise ApiError(404, "there is no such answer, or no longer", code="answer_not_found")
    return Response(data, media_type="application/json", headers={"Cache-Control": "no-store"})


@route
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    endpoint = endpoint_of(request)
    values = await read_json(request)
    try:
        chat = read_chat(values, endpoint.session, endpoint.names)
    except ToolsNeeded as need:
        return await forward_chat(request, endpoint, values, need)
    reply = _Reply(endpoint, chat.answer, is_chat=True, top_logprobs=chat.top_logprobs)
    asked = EndpointRequest(
        chat.answer,
        chat.messages,
        reply.reply_id,
        request.state.owner,
        answer_start=chat.answer_start,
    )
    if chat.answer.stream:
        return await reply.stream(asked)
    return await reply.whole(request, [asked])


@route
async def completions(request: Request) -> Response:
    """Continue texts or token ids."""
    endpoint = endpoint_of(request)
    values = await read_json(request)
    fields = read_completion(values, endpoint.session, endpoint.names)
    _check_echo(fields, endpoint)
    # With `max_tokens: 0` the one token that is written is left out, so it may cost no call.
    answer = replace(fields.answer, local_only=fields.answer.local_only or fields.writes_nothing)
    reply = _Reply(endpoint, answer, is_chat=False, top_logprobs=fields.top_logprobs)
    asked = [
        EndpointRequest(answer, prompt, reply.answer_id(number), request.state.owner)
        for number, prompt in enumerate(fields.prompts)
    ]
    if answer.stream:
        return await reply.stream(asked[0])
    return await reply.whole(request, asked, completion=fields)


def _check_echo(fields: PromptFields, endpoint: AnswerEndpoint) -> None:
    """Raise for an echo that cannot be exact: the large model does not score prompts."""
    if not fields.echo:
        return
    if fields.answer.stream:
        raise wrong("echo", "echo is not streamed", code="unsupported_value")
    if fields.top_logprobs is not None and not fields.answer.is_local(endpoint.session):
        small = endpoint.names.id_of(ModelRole.SMALL)
        raise wrong(
            "echo",
            f"logprobs of a prompt are the small model's alone; ask {small} for them",
            code="unsupported_value",
        )


class _Reply:
    """The reply to one request for answers."""

    def __init__(
        self,
        endpoint: AnswerEndpoint,
        fields: AnswerFields,
        *,
        is_chat: bool,
        top_logprobs: int | None,
    ) -> None:
        self._endpoint = endpoint
        self._fields = fields
        self._is_chat = is_chat
        self.reply_id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(16)
        self._form = ReplyForm(
            is_chat=is_chat,
            reply_id=self.reply_id,
            model=fields.model,
            created=int(time.time()),
            include_usage=fields.include_usage,
        )
        self._logprobs: LogprobForms | None = None
        if top_logprobs is not None:
            vocabulary = endpoint.session.small.vocabulary
            self._logprobs = LogprobForms(vocabulary, top_logprobs, is_chat=is_chat)
        self._answers: list[ServedAnswer] = []
        self._scores: list[ScoredPrompt] = []

    def answer_id(self, number: int) -> str:
        """Return the id of an answer of a reply with several."""
        return self.reply_id if number == 0 else f"{self.reply_id}-{number}"

    async def stream(self, asked: EndpointRequest) -> Response:
        """Reply an answer as a stream."""
        answer = await self._start(asked)
        stream = ChunkStream(
            answer,
            self._form,
            self._fields,
            logprobs=self._logprobs,
            report=self._report,
            notify=self._endpoint.notify,
        )
        headers = {ID_HEADER: self.reply_id}
        return EventStream(
            stream.parts(),
            cancel=self._cancel,
            headers=headers,
            keep_alive_s=self._endpoint.limits.keep_alive_s,
        )

    async def whole(
        self,
        request: Request,
        asked: Sequence[EndpointRequest],
        *,
        completion: PromptFields | None = None,
    ) -> Response:
        """Reply answers in one body, after their prompts if these are to be echoed.

        `completion` are the fields of a request to continue texts; None, the default, in a chat.
        """
        is_scored = bool(completion and completion.echo and self._logprobs)
        work = self._score_all(asked) if is_scored else self._answer_all(asked)
        try:
            await unless_gone(request.receive, work, cancel=self._cancel)
        except ClientGone:
            raise
        except Exception as exc:
            self._cancel()
            calls = sum(answer.calls for answer in self._answers)
            error = to_api_error(exc, calls=calls)
            error.headers[ID_HEADER] = self.reply_id
            raise error from exc
        writes_nothing = completion is not None and completion.writes_nothing
        summary, figures = self._report(writes_nothing=writes_nothing)
        body = self._form.whole(
            [self._choice(number, completion) for number in range(len(self._answers))],
            figures,
            summary,
        )
        return JSONResponse(body, headers={ID_HEADER: self.reply_id})

    async def _score_all(self, asked: Sequence[EndpointRequest]) -> None:
        """Have all answers written and their prompts scored."""
        # A place is taken before the answers, so that a full queue costs no work.
        with self._endpoint.scoring():
            await self._answer_all(asked)
            self._scores = [await self._score(item) for item in asked]

    async def _answer_all(self, asked: Sequence[EndpointRequest]) -> None:
        """Have all answers written, as many at a time as the scheduler runs."""
        limit = self._endpoint.limits.max_running
        for number, item in enumerate(asked):
            if number >= limit:
                await self._answers[number - limit].wait()
            await self._start_after_own(item)
        for answer in self._answers:
            await answer.wait()

    async def _score(self, asked: EndpointRequest) -> ScoredPrompt:
        is_over = threading.Event()
        score = partial(
            self._endpoint.scheduler.score,
            asked.prompt,
            owner=asked.owner,
            is_stopped=is_over.is_set,
        )
        try:
            return await self._endpoint.run_in(self._endpoint.scorers, score)
        finally:
            # If the client has left, the thread would go on.
            is_over.set()

    async def _start_after_own(self, asked: EndpointRequest) -> None:
        """Start an answer; where the queue is full, wait for an earlier answer of this reply.

        Raises QueueFull for the first answer only: a refusal would lose those that have ended.
        """
        while True:
            earlier = [answer for answer in self._answers if not answer.running.ended]
            is_next = bool(self._answers) and not earlier
            try:
                await self._start(replace(asked, completes_reply=is_next))
            except QueueFull:
                if not earlier:
                    raise
                await earlier[0].wait()
            else:
                return

    async def _start(self, asked: EndpointRequest) -> ServedAnswer:
        starting = asyncio.ensure_future(asyncio.to_thread(self._endpoint.start, asked))
        try:
            answer = await asyncio.shield(starting)
        except ContextTooLong as exc:
            param = "messages" if self._is_chat else "prompt"
            raise wrong(param, str(exc), code="context_length_exceeded") from exc
        except asyncio.CancelledError:
            # The thread goes on, and its answer would be nobody's.
            starting.add_done_callback(_cancel_started)
            raise
        self._answers.append(answer)
        try:
            answer.start(asyncio.get_running_loop())
        except BaseException:
            # Without a thread for its events, nobody would read it.
            answer.cancel()
            raise
        return answer

    def _cancel(self) -> None:
        for answer in self._answers:
            answer.cancel()

    def _choice(self, number: int, completion: PromptFields | None) -> dict[str, Any]:
        answer = self._answers[number]
        assert answer.stats is not None
        tokens = [] if completion and completion.writes_nothing else answer.tokens
        prompt_text = answer.running.prompt.text if completion and completion.echo else ""
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.answer(tokens, offset=len(prompt_text))
            if self._scores:
                before = self._logprobs.prompt(self._scores[number])
                logprobs = {key: before[key] + values for key, values in logprobs.items()}
        text = prompt_text + "".join(token.text for token in tokens)
        return self._form.choice(number, text, FINISH_REASONS[answer.stats.finish_reason], logprobs)

    def _report(self, *, writes_nothing: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the summary and the usage of the complete answers."""
        all_stats = [answer.stats for answer in self._answers if answer.stats is not None]
        if writes_nothing:
            all_stats = [replace(stats, tokens=0) for stats in all_stats]
        models = self._answers[0].origin.models
        summary = summarize(
            all_stats,
            role=self._fields.role,
            small=models.small,
            large=models.large,
        )
        prompt_tokens = sum(stats.prompt_tokens for stats in all_stats)
        figures = usage(all_stats, prompt_tokens, summary)
        ids = [self.answer_id(number) for number in range(len(self._answers))]
        answer_ids = {"id": ids[0]} if len(ids) == 1 else {"id": ids[0], "answer_ids": ids}
        return {**answer_ids, **summary, "ignored": list(self._fields.ignored)}, figures


def _cancel_started(starting: asyncio.Future[ServedAnswer]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().cancel()
