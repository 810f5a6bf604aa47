"""A large model that answers from the recorded replies of a document and calls nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mlxroute.answers.document import (
    AnswerDocument,
    DocumentToken,
    LargeChoice,
    RecordedToken,
    TokenDecision,
)
from mlxroute.engine.escalation.failures import ReplyNotRecorded
from mlxroute.types import LargeContext, LargeToken, Uploads

_MAX_IN_FLIGHT = 8


@dataclass(slots=True)
class _Node:
    """The recorded tokens after some ids of the answer, and the nodes of longer ones.

    There may be several tokens, because a server may decide a near tie differently in a later call.
    The first one counts.
    """

    tokens: list[RecordedToken] = field(default_factory=list)
    children: dict[int, _Node] = field(default_factory=dict)

    def child(self, token_id: int) -> _Node:
        return self.children.setdefault(token_id, _Node())

    @property
    def token(self) -> LargeToken | None:
        """The token that a call for this position returns; None if none is recorded."""
        return _large_token(self.tokens[0]) if self.tokens else None


class ReplayedLarge:
    """The large model of a replay: each call returns what was recorded for its position.

    Its `model_name` is empty if the answer had no large model.

    Args:
        document: The answer, with its replies.
        prompt_tokens: Number of prompt tokens, which the recorded positions follow.
    """

    uploads = Uploads()
    is_local = False
    max_in_flight = _MAX_IN_FLIGHT

    def __init__(self, document: AnswerDocument, *, prompt_tokens: int) -> None:
        self.model_name = document.models.large or ""
        self._prompt_tokens = prompt_tokens
        self._root = _Node()
        nodes = [self._root]
        for token in document.tokens:
            nodes.append(nodes[-1].child(token.id))
        for reply in document.replies:
            node = nodes[reply.after]
            for token_id in reply.then:
                node = node.child(token_id)
            for reply_token in reply.tokens:
                node.tokens.append(reply_token)
                for token_id in reply_token.ids:
                    node = node.child(token_id)
        for token in document.tokens:
            node = nodes[token.index]
            if not token.checked:
                # A reply to an earlier position may reach beyond one that was withheld.
                node.tokens.clear()
            elif token.large is not None:
                # The answer had one of them, and need not have had the one of the earliest call.
                node.tokens.sort(key=partial(_likeness, token.large), reverse=True)

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> _ReplayedCall:
        """Return a finished call with the recorded tokens, at most `prefetch` + 1."""
        ids = context.token_ids[self._prompt_tokens :]
        return _ReplayedCall(self._find_tokens(ids, prefetch + 1))

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Return: every call is ready from the start."""

    def _find_tokens(self, ids: Sequence[int], limit: int) -> tuple[LargeToken, ...]:
        tokens: list[LargeToken] = []
        node = _descend(self._root, ids)
        while node is not None and (token := node.token) is not None and len(tokens) < limit:
            tokens.append(token)
            node = _descend(node, token.token_ids)
        return tuple(tokens)


class _ReplayedCall:
    """A call whose tokens are recorded, or that fails because none is."""

    ready = finished = True

    def __init__(self, tokens: tuple[LargeToken, ...]) -> None:
        self._tokens = tokens

    def result(self) -> tuple[LargeToken, ...]:
        if not self._tokens:
            raise ReplyNotRecorded("the large model's reply was not recorded")
        return self._tokens

    def cancel(self) -> None:
        pass


def missing_positions(tokens: Sequence[DocumentToken]) -> list[int]:
    """Return the positions of a replayed answer whose replies were not recorded."""
    return [token.index for token in tokens if token.decision is TokenDecision.UNCHECKED]


def _descend(node: _Node | None, ids: Sequence[int]) -> _Node | None:
    for token_id in ids:
        if node is None:
            return None
        node = node.children.get(token_id)
    return node


def _likeness(choice: LargeChoice, token: RecordedToken) -> tuple[bool, bool, bool]:
    """Return what a token has in common with the large model's choice in the answer."""
    # Where both models end the answer, the choice has the small model's id.
    return token.ends == choice.ends, token.ids == choice.ids, token.logprob == choice.logprob


def _large_token(token: RecordedToken) -> LargeToken:
    return LargeToken(
        token_ids=token.ids,
        text=token.text,
        is_eos=token.ends,
        logprob=token.logprob,
        top=tuple((choice.text, choice.logprob or 0.0) for choice in token.top),
        prompt_tokens=None,
        cached_tokens=None,
        completion_tokens=None,
        uploaded_bytes=0,
        latency_s=token.latency_s,
        large_ids=token.large_ids,
        top_bytes=tuple(
            (choice.text.encode() if choice.bytes is None else choice.bytes, choice.logprob or 0.0)
            for choice in token.top_bytes
        ),
    )
