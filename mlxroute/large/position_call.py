"""Calls for one position of an answer: the requests, and which of them are repeated otherwise."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

from mlxroute.errors import LargeError, LargeNotContinued, LargeProtocolError, LargeTimeout
from mlxroute.large.completion_request import (
    CompletionRequest,
    CompletionRequester,
    TokensNotReplayed,
)
from mlxroute.large.dialects.system_role import SystemRole
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.model_loading import ModelLoading
from mlxroute.large.http.pending_calls import Publish, Tokens
from mlxroute.large.negotiation.shared_negotiator import SharedNegotiator
from mlxroute.large.neutralised_names import NeutralisedNames
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import CompletionAnswer
from mlxroute.large.request_plan import RequestPlan, RequestPlanner
from mlxroute.large.streaming import TokenCall, TokenStream, may_work_unstreamed
from mlxroute.large.vocabulary.reply_reader import read_streamed_tokens
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.types import LargeContext


class PositionCaller:
    """Asks one server for the token at a position, and for later ones. Safe for several threads.

    Args:
        requester: Sends the requests.
        negotiator: Knows the dialect and the pairing of vocabularies, and builds prompts.
        reader: Reads the bytes of the tokens in replies.
        breaker: Refuses calls while the server fails.
        loading: Repeats a call in the background while the server may be loading its model.
        system_role: Knows whether the server takes system messages.
        neutralised: Receives the names of control tokens that are sent with a space inside.
        base_url: The address, for messages.
    """

    def __init__(
        self,
        *,
        requester: CompletionRequester,
        negotiator: SharedNegotiator,
        reader: TokenReader,
        breaker: CircuitBreaker,
        loading: ModelLoading,
        system_role: SystemRole,
        neutralised: NeutralisedNames,
        base_url: str,
    ) -> None:
        self._requester = requester
        self._negotiator = negotiator
        self._reader = reader
        self._breaker = breaker
        self._loading = loading
        self._system_role = system_role
        self._neutralised = neutralised
        self._base_url = base_url
        self._planner = RequestPlanner()

    @property
    def can_stream(self) -> bool:
        """Whether requests for several tokens are streamed; False while no dialect is known."""
        negotiated = self._negotiator.negotiated
        return negotiated is not None and self._planner.can_stream(negotiated)

    def fetch_tokens(
        self,
        context: LargeContext,
        deadline: Deadline,
        publish: Publish,
        *,
        prefetch: int = 0,
        loading_s: float = 0.0,
    ) -> Tokens:
        """Return the token after `context`, and up to `prefetch` later ones.

        Args:
            context: The conversation and the answer so far.
            deadline: The time limit of the call.
            publish: Gets all tokens so far while a streamed reply arrives.
            prefetch: The maximum number of later tokens.
            loading_s: The time limit, in seconds, of the call that is repeated in the background if
                the server may be loading its model; 0 (default) repeats none.

        Raises:
            LargeError: There is no token.
        """
        if deadline.seconds <= 0:
            raise LargeTimeout(f"no time left to ask {self._base_url}")
        call = partial(self._with_shorter_retry, context)
        counted = self._breaker.guard(fragment=bool(context.fragment_ids))
        with self._loading.guard(partial(call, 0), limit_s=loading_s), counted:
            return call(prefetch, deadline, publish)

    def _with_shorter_retry(
        self, context: LargeContext, prefetch: int, deadline: Deadline, publish: Publish
    ) -> Tokens:
        """Make one call, and again without prefetch if that may then fit the server's context.

        If a stream breaks, return the tokens that arrived before.
        """
        pairing = self._negotiator.pair_within(deadline, context.vocabulary)
        call = TokenCall(pairing, deadline, prefetch, TokenStream(publish, deadline))
        try:
            return self._with_stable_context(context, call)
        except LargeError as exc:
            if call.stream.tokens:
                return call.stream.tokens
            if (single := call.shortened(exc)) is None:
                raise
        return self._with_stable_context(context, single)

    def _with_stable_context(self, context: LargeContext, call: TokenCall) -> Tokens:
        """Ask with a context that the server tokenizes as committed; else with the whole one."""
        stable_context = call.pairing.builder.stable_context(context)
        if stable_context is not context:
            with suppress(TokensNotReplayed):
                return self._try_plans(stable_context, call)
        try:
            return self._try_plans(context, call)
        except TokensNotReplayed as exc:
            # The server works; the small model wrote what the large one would not write again.
            raise LargeNotContinued(str(exc)) from exc

    def _try_plans(self, context: LargeContext, call: TokenCall) -> Tokens:
        """Build the prompt and send one plan after the other, until a reply has a token."""
        pairing = call.pairing
        prompt = self._negotiator.build_prompt(context, pairing, call.deadline)
        self._neutralised.add(prompt.neutralised)
        uploaded_bytes = 0
        for plan in self._planner.plans(pairing.negotiated, prefetch=call.prefetch):
            request = CompletionRequest(
                pairing.dialect,
                prompt,
                pairing.model,
                plan.count,
                replayed=pairing.builder.replayed_tokens(context),
                context=context,
            )
            answer = self._send_plan(request, plan, call)
            uploaded_bytes += answer.uploaded_bytes
            if tokens := plan.read(answer, pairing.bridge, self._reader):
                return call.stream.complete(
                    pairing.builder.stable_prefix(context, tokens),
                    answer.completion,
                    uploaded_bytes=uploaded_bytes,
                )
            if self._planner.record_without_token(plan, answer, pairing.negotiated):
                break
        raise LargeProtocolError(f"{self._base_url} gave no whole character for this position")

    def _send_plan(
        self, request: CompletionRequest, plan: RequestPlan, call: TokenCall
    ) -> CompletionAnswer:
        """Send one request; repeat it without streaming if that may help."""

        def listen(partial: CompletionAnswer) -> bool:
            tokens = read_streamed_tokens(partial, call.pairing.bridge, self._reader)
            return call.stream.update(tokens, uploaded_bytes=partial.uploaded_bytes)

        def send(prompt: Prompt) -> CompletionAnswer:
            return self._requester.complete(
                request if prompt is request.prompt else replace(request, prompt=prompt),
                deadline=call.deadline,
                listener=listen if plan.streamed else None,
            )

        negotiated = call.pairing.negotiated
        try:
            answer = self._system_role.send(request.prompt, send, server=negotiated)
        except LargeError as exc:
            if plan.streamed and may_work_unstreamed(exc):
                if call.stream.tokens:
                    raise
                answer = self._send_plan(request, replace(plan, streamed=False), call)
                self._planner.record_failed_stream(exc, negotiated)
                return answer
            self._negotiator.record_failure(exc, negotiated)
            raise
        self._negotiator.record_success()
        self._planner.record_answer(plan)
        return answer
