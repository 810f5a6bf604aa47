"""A chat completion that the server of the large model answers alone, as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeGuard

from mlxroute.errors import LargeNotContinued, LargeRefused
from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects import Dialect, RequestOptions
from mlxroute.large.dialects.base import NO_THINKING
from mlxroute.large.dialects.chat.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.chat.fielded_dialect import FieldedDialect
from mlxroute.large.dialects.chat.request_fields import RequestFields, Thinking
from mlxroute.large.dialects.chat.thinking_switch import ThinkingSwitch
from mlxroute.large.dialects.json_fields import usage_counts
from mlxroute.large.dialects.system_role import SystemRole, refuses_system
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.negotiation.shared_negotiator import SharedNegotiator
from mlxroute.large.neutralised_names import NeutralisedNames
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion, ReplyPosition, ReplyToken
from mlxroute.ledger import Ledger
from mlxroute.messages import fold_system
from mlxroute.types import Message

# Whole answers continue no turn, so all ways to mark one send the same.
_CHAT: Final = ChatContinuation(ContinuationMethod.TRAILING, logprobs=False)
# Fields of a request that are texts of the prompt; some servers put `documents` into it.
_CONVERSATION: Final = frozenset({"messages", "documents"})
# Keys of texts that describe a tool, or a part of a schema, to the model.
_DESCRIPTIONS: Final = frozenset({"description", "title"})


class WholeChat:
    """One chat completion of the server. `LargeModel.whole_chat` makes it.

    Args:
        requester: Sends the request.
        breaker: Refuses it while the server fails.
        ledger: Counts its tokens.
        negotiator: Knows the model's name, its control tokens and the dialect.
        system_role: Knows whether the server takes system messages.
        thinking_switch: Knows whether the server refuses to be asked not to think.
        neutralised: Receives the names of control tokens that are sent with a space inside.
        timeout_s: The time limit of the call, in seconds.
    """

    def __init__(
        self,
        *,
        requester: CompletionRequester,
        breaker: CircuitBreaker,
        ledger: Ledger,
        negotiator: SharedNegotiator,
        system_role: SystemRole,
        thinking_switch: ThinkingSwitch,
        neutralised: NeutralisedNames,
        timeout_s: float,
    ) -> None:
        self._requester = requester
        self._breaker = breaker
        self._ledger = ledger
        self._negotiator = negotiator
        self._dialect = negotiator.dialect
        self._model = negotiator.sent_model
        self._controls = negotiator.control_tokens
        self._server = negotiator.negotiated
        self._system_role = system_role
        self._thinking_switch = thinking_switch
        self._neutralised = neutralised
        self._deadline = Deadline(timeout_s)

    def ask(self, body: Mapping[str, object]) -> Mapping[str, object]:
        """Send a request with this body and the model's name; return the reply. Raises LargeError.

        Names of control tokens in messages, and in descriptions of tools and schemas, are sent as
        plain text, with a space inside. A system message that the server's template refuses is sent
        as a part of the first user message, and a limit of tokens under the name that the server
        takes. Blocks until the reply is complete.
        """
        with self._breaker.guard(forwarded=True):
            # The server may have been down when the client connected.
            self._model = self._negotiator.find_model(self._deadline)
            if self._dialect is not None:
                body = _whole_fields(self._dialect).rename_limit(body)
            messages = body.get("messages")
            try:
                return self._post(body)
            except LargeRefused as exc:
                if not _may_move_system(messages) or not refuses_system(exc):
                    raise
            return self._post({**body, "messages": list(fold_system(messages))})

    def answer(self, messages: Sequence[Message], *, max_tokens: int) -> Completion:
        """Return the model's own answer to a conversation, with the fields that the server takes.

        Raises LargeError.
        """
        options = RequestOptions(max_tokens, top_logprobs=1, model=self._model)
        fields = _whole_fields(self._dialect)

        def send(prompt: Prompt) -> Completion:
            def post(fields: RequestFields) -> Mapping[str, object]:
                return self._post(_CHAT.with_fields(fields).request(prompt, options))

            # A refusal of the switch alone is not a failure of the server.
            with self._breaker.guard():
                reply = self._thinking_switch.send(fields, post, server=self._server)
            try:
                return _CHAT.completion(reply, prompt)
            except LargeNotContinued:
                # A whole answer that a filter withheld is empty.
                position = ReplyPosition(ReplyToken(text=""))
                return Completion((position,), "", **usage_counts(reply))

        prompt = Prompt(messages=tuple(messages))
        return self._system_role.send(prompt, send, server=self._server)

    def _post(self, body: Mapping[str, object]) -> Mapping[str, object]:
        plain = self._plain_body(body)
        if self._model is not None:
            plain["model"] = self._model
        reply = self._requester.post(
            "/chat/completions", plain, deadline=self._deadline, at_root=False, whole_answer=True
        )
        counts = usage_counts(reply)
        self._ledger.record_usage(
            prompt_tokens=counts["prompt_tokens"] or 0,
            cached_tokens=counts["cached_tokens"] or 0,
            completion_tokens=counts["completion_tokens"] or 0,
        )
        self._requester.check_secret(reply)
        return reply

    def cancel(self) -> None:
        """End the call now, from any thread."""
        self._deadline.cancel()

    def _plain_body(self, body: Mapping[str, object]) -> dict[str, object]:
        return {
            key: _change_texts(value, self._plain)
            if key in _CONVERSATION
            else _change_descriptions(value, self._plain)
            for key, value in body.items()
        }

    def _plain(self, text: str) -> str:
        plain, names = self._controls.neutralise(text)
        self._neutralised.add(names)
        return plain


def _whole_fields(dialect: Dialect | None) -> RequestFields:
    """Return the fields of a whole answer, whose model thinks no more than for single tokens."""
    if not isinstance(dialect, FieldedDialect):
        return RequestFields(thinking=Thinking.TEMPLATE)
    # Some dialects send the switch apart from their fields.
    if dialect.fields.thinking is Thinking.UNSET and dialect.own_names >= NO_THINKING.keys():
        return replace(dialect.fields, thinking=Thinking.TEMPLATE)
    return dialect.fields


def _may_move_system(messages: object) -> TypeGuard[list[Message]]:
    """Return whether a request has a system message that can be moved.

    All system and user messages are texts then, and not lists of parts. The others may have any
    further keys, such as those of a call of a tool.
    """
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        return False
    moved = [item for item in messages if item.get("role") in ("system", "user")]
    has_system = any(item["role"] == "system" for item in moved)
    is_plain = all(isinstance(item.get("content"), str) for item in moved)
    return has_system and is_plain and all("role" in item for item in messages)


def _change_texts(value: object, change: Callable[[str], str]) -> object:
    """Return a JSON value with every text in it changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_change_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _change_texts(item, change) for key, item in value.items()}
    return value


def _change_descriptions(value: object, change: Callable[[str], str]) -> object:
    """Return a JSON value with its descriptions changed; the reply has to match all other texts."""
    if isinstance(value, list):
        return [_change_descriptions(item, change) for item in value]
    if isinstance(value, dict):
        return {
            key: change(item)
            if key in _DESCRIPTIONS and isinstance(item, str)
            else _change_descriptions(item, change)
            for key, item in value.items()
        }
    return value
