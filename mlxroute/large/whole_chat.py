"""A chat completion that the server of the large model answers alone, as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects import RequestOptions
from mlxroute.large.dialects.chat.chat_continuation import ChatContinuation, ContinuationMethod
from mlxroute.large.dialects.chat.fielded_dialect import FieldedDialect
from mlxroute.large.dialects.json_fields import usage_counts
from mlxroute.large.dialects.system_role import SystemRole
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.negotiation.shared_negotiator import SharedNegotiator
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion
from mlxroute.ledger import Ledger
from mlxroute.types import Message


class WholeChat:
    """One chat completion of the server. `LargeModel.whole_chat` makes it.

    Args:
        requester: Sends the request.
        breaker: Refuses it while the server fails.
        ledger: Counts its tokens.
        negotiator: Knows the model's name, its control tokens and the dialect.
        system_role: Knows whether the server takes system messages.
        timeout_s: The time limit of the call, in seconds.
    """

    def __init__(
        self,
        requester: CompletionRequester,
        breaker: CircuitBreaker,
        ledger: Ledger,
        negotiator: SharedNegotiator,
        system_role: SystemRole,
        *,
        timeout_s: float,
    ) -> None:
        self._requester = requester
        self._breaker = breaker
        self._ledger = ledger
        self._dialect, model = negotiator.dialect, negotiator.model
        self._model = model.for_requests(self._dialect) if self._dialect else model.known
        self._controls = negotiator.control_tokens
        self._server = negotiator.negotiated
        self._system_role = system_role
        self._deadline = Deadline(timeout_s)

    def ask(self, body: Mapping[str, object]) -> Mapping[str, object]:
        """Send a request with this body and the model's name; return the reply. Raises LargeError.

        Names of control tokens in messages are sent as plain text, with a space inside. Blocks
        until the reply is complete.
        """
        named = {**body} if self._model is None else {**body, "model": self._model}
        if "messages" in body:
            named["messages"] = _change_texts(body["messages"], self._plain)
        with self._breaker.guard(forwarded=True):
            reply = self._requester.post(
                "/chat/completions", named, deadline=self._deadline, at_root=False
            )
        counts = usage_counts(reply)
        self._ledger.record_usage(
            prompt_tokens=counts["prompt_tokens"] or 0,
            cached_tokens=counts["cached_tokens"] or 0,
            completion_tokens=counts["completion_tokens"] or 0,
        )
        return reply

    def answer(self, messages: Sequence[Message], *, max_tokens: int) -> Completion:
        """Return the model's own answer to a conversation, with the fields that the server takes.

        Raises LargeError.
        """
        # Without a turn to continue, flags only turn thinking off, as in prompts for one token.
        dialect = ChatContinuation(ContinuationMethod.FLAGS, logprobs=False)
        if isinstance(self._dialect, FieldedDialect):
            dialect = ChatContinuation(ContinuationMethod.TRAILING, logprobs=False)
            dialect = dialect.with_fields(self._dialect.fields)
        options = RequestOptions(max_tokens, top_logprobs=1, model=self._model)

        def send(prompt: Prompt) -> Completion:
            return dialect.completion(self.ask(dialect.request(prompt, options)), prompt)

        prompt = Prompt(messages=tuple(messages))
        return self._system_role.send(prompt, send, server=self._server)

    def cancel(self) -> None:
        """End the call now, from any thread."""
        self._deadline.cancel()

    def _plain(self, text: str) -> str:
        return self._controls.neutralise(text)[0]


def _change_texts(value: object, change: Callable[[str], str]) -> object:
    """Return a JSON value with every text in it changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_change_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _change_texts(item, change) for key, item in value.items()}
    return value
