"""The large model's logprobs of an answer that it did not write itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects.scoring import ScoringMethod, find_scoring_method
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.negotiation.shared_negotiator import SharedNegotiator
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion
from mlxroute.ledger import Ledger
from mlxroute.types import LargeContext


class AnswerScorer:
    """Asks the server how likely the large model finds an answer. `LargeModel.scorer` makes it.

    Args:
        requester: Sends the requests.
        breaker: Refuses them while the server fails.
        ledger: Counts their tokens.
        negotiator: Knows the dialect, and how to build prompts in it.
        timeout_s: The time limit of each request, in seconds.
    """

    def __init__(
        self,
        *,
        requester: CompletionRequester,
        breaker: CircuitBreaker,
        ledger: Ledger,
        negotiator: SharedNegotiator,
        timeout_s: float,
    ) -> None:
        self._requester = requester
        self._breaker = breaker
        self._ledger = ledger
        self._negotiator = negotiator
        self._timeout_s = timeout_s

    def score(self, prompt: LargeContext, answered: LargeContext) -> Iterator[float]:
        """Yield the logprob in nats of each token of an answer, in the large model's tokens.

        `answered` is `prompt` with the answer, which ends on a whole character. Raises
        LargeProtocolError if the server gives no logprobs of it, other LargeErrors if it fails.
        """
        deadline = Deadline(self._timeout_s)
        pairing = self._negotiator.pair_within(deadline, prompt.vocabulary)
        method = find_scoring_method(pairing.dialect)
        if method is None:
            raise LargeProtocolError(
                f"a server with the dialect {pairing.dialect.name} gives no logprobs of a text"
                " that it did not write"
            )
        prefix = self._negotiator.build_prompt(prompt, pairing, deadline)
        whole = self._negotiator.build_prompt(answered, pairing, deadline)
        if whole.ids[: len(prefix.ids)] != prefix.ids or not whole.text.startswith(prefix.text):
            raise LargeProtocolError("the server's prompt changes with the answer after it")
        for number, body in enumerate(method.requests(prefix, whole, pairing.model)):
            reply = self._post(method, body)
            completion = method.read(reply, number, prefix, whole)
            self._record_usage(completion, whole)
            for position in completion.positions:
                assert position.token.logprob is not None
                yield position.token.logprob

    def _post(self, method: ScoringMethod, body: Mapping[str, object]) -> Mapping[str, object]:
        """Send a request. Raises LargeProtocolError where the server refuses requests like it."""
        refusal = None
        with self._breaker.guard():
            try:
                return self._requester.post(
                    method.path, body, deadline=Deadline(self._timeout_s), at_root=method.at_root
                )
            except LargeRefused as exc:
                # These are about every request, not about scoring.
                if exc.may_pass or exc.is_access:
                    raise
                refusal = exc
        raise LargeProtocolError(str(refusal)) from refusal

    def _record_usage(self, completion: Completion, whole: Prompt) -> None:
        prompt_tokens = completion.prompt_tokens
        self._ledger.record_usage(
            prompt_tokens=len(whole.ids) if prompt_tokens is None else prompt_tokens,
            cached_tokens=completion.cached_tokens or 0,
            completion_tokens=completion.completion_tokens or 0,
        )
