"""The bodies of replies: whole ones and the chunks of streams, of chat and text completions."""

from __future__ import annotations

from typing import Any, Final

ID_HEADER: Final = "x-mlxroute-id"
"""The header with the id of a reply."""


class ReplyForm:
    """The keys that all bodies of one reply share.

    Args:
        is_chat: Whether it is a chat completion; otherwise a text completion.
        reply_id: The id of the reply.
        model: The id of the model.
        created: Unix time of the request, in seconds.
        include_usage: Whether each chunk has a `usage`.
    """

    def __init__(
        self, *, is_chat: bool, reply_id: str, model: str, created: int, include_usage: bool
    ) -> None:
        self._is_chat = is_chat
        self._keys = {"id": reply_id, "created": created, "model": model}
        self._include_usage = include_usage

    def whole(
        self, choices: list[dict[str, Any]], usage: dict[str, Any], summary: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the body of a whole reply."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage, "mlxroute": summary}

    def choice(
        self, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return a choice of a whole reply."""
        if self._is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            content: dict[str, Any] = {"index": index, "message": message}
        else:
            content = {"index": index, "text": text}
        return {**content, "logprobs": logprobs, "finish_reason": finish_reason}

    def first_chunk(self) -> dict[str, Any] | None:
        """Return the chunk with the role; None where there is none."""
        return self.delta_chunk({"role": "assistant", "content": ""}) if self._is_chat else None

    def delta_chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a chunk of a chat completion that adds the fields of `delta` to the message."""
        return self._chunk(delta, logprobs=logprobs)

    def text_chunk(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """Return a chunk that adds text."""
        return self._chunk({"content": text}, text=text, logprobs=logprobs)

    def last_chunk(self, finish_reason: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk with the finish reason and what was routed."""
        return {**self._chunk({}, finish_reason=finish_reason), "mlxroute": summary}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk after the last one, with the usage and no choice."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage}

    def event_chunk(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return a chunk with an event and no choice, for clients that asked for events."""
        chunk = {**self._head(self._chunk_kind), "choices": [], "mlxroute": event}
        return chunk | ({"usage": None} if self._include_usage else {})

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._keys["id"], "object": kind, **self._keys}

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        text: str = "",
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head(self._chunk_kind), "choices": [choice]}
        return chunk | ({"usage": None} if self._include_usage else {})
