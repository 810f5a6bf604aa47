"""Requests with tools or a schema, which the large model answers alone."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlxroute.config.setting_choices import ToolPolicyName
from mlxroute.engine.escalation.never_send import find_match
from mlxroute.errors import LargeError, LargeRefused
from mlxroute.large.dialects.json_fields import Counts, json_items, usage_counts
from mlxroute.serving.http.answer_endpoint import AnswerEndpoint
from mlxroute.serving.http.api_error import ApiError, log_failure, to_api_error, wrong
from mlxroute.serving.http.model_names import ModelRole
from mlxroute.serving.http.parsing.chat_fields import ToolsNeeded, usual_messages
from mlxroute.serving.http.parsing.common_fields import (
    NO_LIMIT,
    TOOL_CHOICE_FIELDS,
    TOOL_FIELDS,
    read_include_usage,
)
from mlxroute.serving.http.parsing.fields import Fields, clean_json
from mlxroute.serving.http.replies.event_stream import (
    DONE,
    ClientGone,
    EventStream,
    encode_error,
    encode_event,
    unless_gone,
)
from mlxroute.serving.http.replies.forwarded_reply import read_choices, read_usage, reply_chunks
from mlxroute.serving.http.replies.reply_forms import ID_HEADER, ReplyForm
from mlxroute.serving.requests import SchedulerClosed
from mlxroute.types import Uploads
from mlxroute.view.figures import format_count

# Fields of routed answers, which a forwarded request does not have.
_ROUTED_FIELDS: Final = frozenset({"budget", "threshold", "mode", "exact", "events"})
# Fields that are the endpoint's own, or that it answers itself.
_OWN_FIELDS: Final = _ROUTED_FIELDS | {"local_only", "stream", "stream_options"}
# Fields without effect, by their values, which some servers refuse.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), (NO_LIMIT,)),
    **dict.fromkeys(TOOL_FIELDS, (None, [])),
}
_MAX_ANSWER_S: Final = 600.0
_JSON_ESCAPE: Final = re.compile(r'\\(?:u([0-9a-fA-F]{4})|(["\\/bfnrt]))')
_ESCAPED_CONTROLS: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MAX_NESTED_JSON: Final = 4


async def forward_chat(
    request: Request, endpoint: AnswerEndpoint, values: Mapping[str, Any], need: ToolsNeeded
) -> Response:
    """Have the large model answer a whole request. Raises ApiError where that is not allowed."""
    fields = Fields(values)
    role = endpoint.names.role(fields.text("model"))
    _check_policy(endpoint, role, fields, need)
    is_stream = fields.flag("stream")
    include_usage = is_stream and read_include_usage(fields)
    with ExitStack() as place:
        # Before a stream begins, so that it too can be refused with a status.
        place.enter_context(endpoint.forwarding())
        await _check_never_send(request, endpoint, values, need)
        forwarded = _ForwardedChat(endpoint, values, need, include_usage=include_usage)
        if not is_stream:
            return await forwarded.whole(request)
        return EventStream(
            forwarded.stream(),
            cancel=forwarded.cancel,
            headers={ID_HEADER: forwarded.reply_id},
            keep_alive_s=endpoint.limits.keep_alive_s,
            on_end=place.pop_all().close,
        )


def _check_policy(
    endpoint: AnswerEndpoint, role: ModelRole, fields: Fields, need: ToolsNeeded
) -> None:
    if endpoint.limits.tools is not ToolPolicyName.LARGE:
        reason = "an endpoint of `serve --tools large` lets the large one answer them"
    elif endpoint.session.large is None:
        reason = "only a large model could answer such requests, and there is none"
    elif role is ModelRole.SMALL or fields.flag("local_only"):
        reason = "the small model cannot answer such requests alone"
    else:
        return
    raise wrong(
        need.param,
        f"{need.param}: the routed model has no tools and no schemas; {reason}",
        code="unsupported_value",
    )


async def _check_never_send(
    request: Request, endpoint: AnswerEndpoint, values: Mapping[str, Any], need: ToolsNeeded
) -> None:
    patterns = endpoint.session.options.never_send
    if not patterns:
        return

    def matches() -> bool:
        return find_match(patterns, _searched_texts(values)) is not None

    # A large body takes seconds, in which other requests are to be answered.
    searching = asyncio.to_thread(matches)
    if await unless_gone(request.receive, searching, cancel=lambda: None):
        raise ApiError(400, "a never-send pattern keeps this request here", param=need.param)


class _ForwardedChat:
    """One request that is sent on, and its reply under the endpoint's own names."""

    def __init__(
        self,
        endpoint: AnswerEndpoint,
        values: Mapping[str, Any],
        need: ToolsNeeded,
        *,
        include_usage: bool,
    ) -> None:
        assert endpoint.session.large is not None
        self._endpoint = endpoint
        self._large = endpoint.session.large
        self._need = need
        self._ignored = sorted(_ROUTED_FIELDS & values.keys())
        self._body: dict[str, Any] = clean_json(_sent_fields(values))
        self._body.pop("model", None)
        if "messages" in self._body:
            self._body["messages"] = usual_messages(self._body["messages"])
        self._call = self._large.whole_chat(timeout_s=_MAX_ANSWER_S)
        self.reply_id = f"chatcmpl-{secrets.token_hex(16)}"
        self._include_usage = include_usage
        self._form = ReplyForm(
            is_chat=True,
            reply_id=self.reply_id,
            model=endpoint.names.id_of(ModelRole.LARGE),
            created=int(time.time()),
            include_usage=include_usage,
        )

    def cancel(self) -> None:
        """End the call."""
        self._call.cancel()

    async def whole(self, request: Request) -> Response:
        """Reply in one body. Raises ApiError, and ClientGone."""
        headers = {ID_HEADER: self.reply_id}
        try:
            reply = await unless_gone(request.receive, self._ask(), cancel=self.cancel)
            return JSONResponse(reply, headers=headers)
        except ClientGone:
            raise
        except Exception as exc:
            error = _to_api_error(exc)
            error.headers.update(headers)
            raise error from exc

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the reply as the events of a stream; it is sent as soon as it is whole."""
        yield encode_event(self._form.delta_chunk({"role": "assistant", "content": ""}))
        try:
            reply = await self._ask()
            for chunk in reply_chunks(self._form, reply, include_usage=self._include_usage):
                yield encode_event(chunk)
        except Exception as exc:  # noqa: BLE001 - the status was sent already
            log_failure(exc, self._endpoint.notify)
            yield encode_error(_to_api_error(exc))
            return
        yield DONE

    async def _ask(self) -> dict[str, Any]:
        """Return the body of the whole reply. Raises ApiError and LargeError."""
        return await self._endpoint.run_in(self._endpoint.forwards, self._exchange)

    def _exchange(self) -> dict[str, Any]:
        endpoint = self._endpoint
        began_s = time.perf_counter()
        reply = self._call.ask(self._body)
        summary = self._summary(usage_counts(reply))
        endpoint.metrics.on_forwarded(
            tokens=summary["tokens"],
            prompt_tokens=summary["uploaded_tokens"],
            cost=summary["cost_estimate"] or 0.0,
            seconds=time.perf_counter() - began_s,
        )
        tokens = format_count(summary["tokens"], "token")
        endpoint.notify(f"large alone, for {self._need.param}: {tokens} in 1 call")
        endpoint.log_warnings()
        return self._form.whole(
            read_choices(reply),
            {**read_usage(reply), "mlxroute": summary},
            {"id": self.reply_id, **summary},
        )

    def _summary(self, counts: Counts) -> dict[str, Any]:
        uploads = Uploads(
            requests=1,
            tokens=counts["prompt_tokens"] or 0,
            cached_tokens=counts["cached_tokens"] or 0,
            completion_tokens=counts["completion_tokens"] or 0,
        )
        session = self._endpoint.session
        prices = session.adapt_options(session.options).prices
        return {
            "role": ModelRole.LARGE,
            "forwarded": True,
            "small": None,
            "large": self._large.model_name,
            "tokens": uploads.completion_tokens,
            "large_tokens": uploads.completion_tokens,
            "calls": 1,
            "uploaded_tokens": uploads.tokens,
            "cost_estimate": None if prices is None else prices.cost(uploads),
            "ignored": self._ignored,
        }


def _sent_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that are for the server, without those of no effect."""
    sent = {
        key: item
        for key, item in values.items()
        if key not in _OWN_FIELDS and item not in _NEUTRAL.get(key, ())
    }
    for tools, choice in zip(TOOL_FIELDS, TOOL_CHOICE_FIELDS, strict=True):
        if tools not in sent and sent.get(choice) in (None, "none", "auto"):
            sent.pop(choice, None)
    if "tools" not in sent:
        sent.pop("parallel_tool_calls", None)
    return sent


def _to_api_error(exc: Exception) -> ApiError:
    """Return what is replied for a failed request; a refusal of the server keeps its status."""
    is_free = isinstance(exc, SchedulerClosed) or (
        isinstance(exc, LargeError) and not exc.was_called
    )
    error: Exception = exc
    if isinstance(exc, LargeRefused):
        is_free = exc.status == HTTPStatus.TOO_MANY_REQUESTS
        error = ApiError(
            exc.status if 400 <= exc.status <= 429 else 502,
            f"the large model's server refused the request: {exc}",
            code="large_model_failed",
            retry_after_s=math.ceil(exc.retry_after_s) or None,
        )
    return to_api_error(error, calls=0 if is_free else 1)


def _searched_texts(values: Mapping[str, Any]) -> list[str]:
    """Return all texts of a request, alone and joined, each once: the model reads them as one.

    Numbers are texts too, unless they are options, such as `max_tokens`. A text with escapes of
    JSON, such as the arguments of a call, is there a second time without them.
    """
    texts, contents = [], []
    for item in json_items(values):
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, list):
            contents.append("".join(map(_part_text, item)))
        elif isinstance(item, dict) and isinstance(item.get("content"), str):
            contents.append(item["content"])
    joined = [glue.join(parts) for parts in (texts, contents) for glue in ("", "\n")]
    nested = json_items([item for item in values.values() if isinstance(item, dict | list)])
    numbers = [str(item) for item in nested if type(item) in (int, float)]
    written = dict.fromkeys([*texts, *contents, *joined, *numbers])
    return list(dict.fromkeys(form for text in written for form in _read_forms(text)))


def _read_forms(text: str) -> Iterator[str]:
    """Yield a text, and the same without escapes of JSON; again if that is JSON too."""
    yield text
    for _ in range(_MAX_NESTED_JSON):
        plain = _JSON_ESCAPE.sub(_read_escape, text)
        if plain == text:
            return
        # Two escapes can be halves of one character.
        text = plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text


def _read_escape(match: re.Match[str]) -> str:
    code, letter = match.groups()
    return chr(int(code, 16)) if code else _ESCAPED_CONTROLS.get(letter, letter)


def _part_text(part: Any) -> str:
    """Return the text of a part of a content; empty if it has none."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""
