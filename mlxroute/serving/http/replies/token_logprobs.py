"""Logprobs of tokens in the two forms of the API, with the origin of each token."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any

from mlxroute.answers.record_json import to_json
from mlxroute.answers.token_description import describe_ids, describe_token
from mlxroute.serving.requests import ScoredPrompt
from mlxroute.types import Source, Token, Vocabulary

# What OpenAI's API gives for a token whose logprob is not known.
UNKNOWN_LOGPROB = -9999.0
_PROVENANCE = (
    *("source", "score", "threshold", "decision", "checked", "unchecked_reason", "prefetched"),
    *("small", "large"),
)


class LogprobForms:
    """The logprobs of one answer's tokens.

    Args:
        vocabulary: The small model's vocabulary.
        top: Number of alternatives of each token.
        is_chat: Whether they are those of a chat completion; otherwise of a text completion.
    """

    def __init__(self, vocabulary: Vocabulary, top: int, *, is_chat: bool) -> None:
        self._vocabulary = vocabulary
        self._top = top
        self._is_chat = is_chat

    def answer(self, tokens: Iterable[Token], *, offset: int = 0) -> dict[str, Any]:
        """Return the `logprobs` of a choice; the text of a text completion starts at `offset`."""
        return self._chat(tokens) if self._is_chat else self._completion(tokens, offset)

    def _chat(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """Return the `logprobs` of a choice of a chat completion, without the end token."""
        ends = self._vocabulary.eos_ids
        content = [self._entry(token) for token in tokens if token.token_id not in ends]
        return {"content": content, "refusal": None}

    def _completion(self, tokens: Iterable[Token], offset: int) -> dict[str, Any]:
        """Return the `logprobs` of a choice of a text completion, whose text starts at `offset`.

        The end token has an entry, because lm-eval drops the last entry as the one of the answer.
        """
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
            "provenance": [],
        }
        for token in tokens:
            entry = self._entry(token)
            lists["tokens"].append(entry["token"])
            lists["token_logprobs"].append(entry["logprob"])
            top = {item["token"]: item["logprob"] for item in entry["top_logprobs"]}
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(offset)
            origin = {name: entry[name] for name in ("text", *_PROVENANCE) if name in entry}
            lists["provenance"].append(origin)
            offset += len(token.text)
        return lists

    def prompt(self, prompt: ScoredPrompt) -> dict[str, Any]:
        """Return the `logprobs` of the prompt itself, in the form of a text completion."""
        texts = [describe_ids((token_id,), self._vocabulary)[0] for token_id in prompt.ids]
        tops: list[dict[str, float] | None] = [None]
        for signals, token_id, logprob in zip(
            prompt.signals, prompt.ids[1:], prompt.logprobs, strict=True
        ):
            pairs = list(zip(signals.top_ids, signals.top_logprobs, strict=False))[: self._top]
            # The token itself comes last: where two tokens have one text, its own logprob counts.
            pairs = [pair for pair in pairs if pair[0] != token_id] + [(token_id, logprob)]
            tops.append({self._choice(i, value)["token"]: _finite(value) for i, value in pairs})
        return {
            "tokens": texts,
            "token_logprobs": [None, *map(_finite, prompt.logprobs)],
            "top_logprobs": tops,
            "text_offset": self._offsets(prompt, texts),
            "provenance": [None] * len(texts),
        }

    def _offsets(self, prompt: ScoredPrompt, names: Sequence[str]) -> list[int]:
        """Return where each token begins in the prompt's text, in characters.

        A token that continues a character has that character's offset. `names` are the tokens as
        shown.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        offsets: list[int] = []
        offset = 0
        for token_id, name in zip(prompt.ids, names, strict=True):
            data = self._vocabulary.token_bytes(token_id)
            if not data:
                # A control token ends an incomplete character, which the text shows as U+FFFD.
                offset += len(decoder.decode(b"", final=True))
            offsets.append(offset)
            if data:
                offset += len(decoder.decode(data))
            elif prompt.text.startswith(name, offset):
                # The begin token that the tokenizer adds is not in the text.
                offset += len(name)
        return offsets

    def _entry(self, token: Token) -> dict[str, Any]:
        """Return the entry of a token: OpenAI's keys, the text that it adds, and its origin."""
        record = to_json(describe_token(token, self._vocabulary))
        text, data = describe_ids((token.token_id,), self._vocabulary)
        top = self._large_top(token) if token.source is Source.LARGE else self._small_top(token)
        if token.index == 0 and text == f" {token.text}":
            # The answer leaves out the tokenizer's space, and so do the names.
            text, top = token.text, list(map(_without_space, top))
        return {
            "token": text,
            "logprob": self._logprob(token),
            "bytes": list(text.encode() if data is None else data),
            "top_logprobs": top[: self._top],
            "text": token.text,
            **{name: record[name] for name in _PROVENANCE if name in record},
        }

    def _logprob(self, token: Token) -> float:
        return _finite(self._known_logprob(token))

    def _known_logprob(self, token: Token) -> float:
        """Return the logprob that the token's own model gave it."""
        signals, escalation = token.signals, token.escalation
        if token.source is Source.LARGE:
            if escalation is None:
                # The first part of a large token carries the logprob of the whole one.
                return 0.0
            large = escalation.large
            if large is not None and large.logprob is not None:
                return large.logprob
        elif token.token_id == signals.token_id:
            return signals.logprob
        known = dict(zip(signals.top_ids, signals.top_logprobs, strict=False))
        return known.get(token.token_id, UNKNOWN_LOGPROB)

    def _small_top(self, token: Token) -> list[dict[str, Any]]:
        signals = token.signals
        pairs = zip(signals.top_ids, signals.top_logprobs, strict=False)
        return [self._choice(token_id, logprob) for token_id, logprob in pairs]

    def _choice(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, data = describe_ids((token_id,), self._vocabulary)
        return _choice(text, logprob, text.encode() if data is None else data)

    def _large_top(self, token: Token) -> list[dict[str, Any]]:
        large = None if token.escalation is None else token.escalation.large
        if large is None:
            return []
        pairs = large.top
        return [_choice(text, logprob, text.encode(errors="replace")) for text, logprob in pairs]


def _choice(text: str, logprob: float, data: Sequence[int]) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _without_space(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice without the space at its beginning, if there is one."""
    start = int(choice["token"].startswith(" "))
    return _choice(choice["token"][start:], choice["logprob"], choice["bytes"][start:])


def _finite(logprob: float) -> float:
    """Return a logprob that JSON can carry."""
    return logprob if math.isfinite(logprob) else UNKNOWN_LOGPROB
