"""Finds out how a server is best asked, by questions whose answers are known, not by its name."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused
from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects import LADDER, Dialect
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.negotiation import probe_questions
from mlxroute.large.negotiation.probe_questions import ProbeQuestion
from mlxroute.large.negotiation.verdict_file import CapabilityCheck, RejectedDialect
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import CompletionAnswer, ReplyPosition
from mlxroute.large.vocabulary.token_reader import REPLACEMENT
from mlxroute.large.vocabulary.token_sources import TokenSource
from mlxroute.safe_text import printable_line

# Statuses that say nothing about the dialect: the key, the load, the server's health. A plain 500
# is what many servers answer to a body that they do not understand.
_NOT_THE_DIALECT: Final = {401, 402, 403, 408, 429, 502, 503, 504}
_SLACK: Final = 1e-3
_MOST_PARTS: Final = 4
_TEXT_ONLY: Final = 4
_NAMED: Final = 24


class _Unfit(Exception):
    """The dialect at hand is refused; the text says why."""


@dataclass(frozen=True, slots=True)
class Found:
    """The dialect that tells the truth, and what was seen on the way. Latencies in seconds."""

    dialect: Dialect
    checks: tuple[CapabilityCheck, ...]
    refusals: tuple[RejectedDialect, ...]
    latencies_s: tuple[float, ...]
    calls: int


class Prober:
    """Tries the dialects in order; `deadline` makes the bound of each call."""

    def __init__(
        self,
        asker: CompletionRequester,
        tokens: TokenSource | None,
        *,
        deadline: Callable[[], Deadline],
    ) -> None:
        self._asker = asker
        self._tokens = tokens
        self._deadline = deadline
        self._latencies_s: list[float] = []
        self._calls = 0

    def find(self, ladder: Sequence[Dialect] = LADDER) -> Found:
        """The first dialect of the ladder that answers every question truthfully.

        Raises LargeError: the server's own trouble, or LargeProtocolError when no dialect will do.
        """
        refusals: list[RejectedDialect] = []
        for dialect in ladder:
            try:
                checks = self._examined(dialect)
            except _Unfit as exc:
                refusals.append(RejectedDialect(dialect.name, str(exc)))
                continue
            return Found(dialect, checks, tuple(refusals), tuple(self._latencies_s), self._calls)
        raise NoUsableDialect(refusals)

    def fits(self, dialect: Dialect) -> bool:
        """Whether a dialect still continues a word, asked just once."""
        try:
            self._mid_word(dialect)
        except _Unfit:
            return False
        return True

    def have_named(self, dialect: Dialect, question: ProbeQuestion) -> None:
        """Have the server write many tokens, whose names the reader takes note of.

        Raises LargeError: the server's own trouble.
        """
        with contextlib.suppress(_Unfit):
            self._ask(dialect, self._prompt(dialect, question), _NAMED)

    def _examined(self, dialect: Dialect) -> tuple[CapabilityCheck, ...]:
        self._latencies_s.clear()
        checks = [self._mid_word(dialect)]
        checks.append(self._logprobs(dialect))
        if not checks[-1].passed and dialect.rung < _TEXT_ONLY:
            raise _Unfit(f"logprobs: {checks[-1].detail}")
        examinations = (
            self._trailing_space,
            self._multi_byte,
            self._consecutive,
            self._ends,
            *((self._ids,) if dialect.form is PromptForm.IDS else ()),
        )
        for examine in examinations:
            checks.append(examine(dialect))
            if checks[-1].passed is False:
                raise _Unfit(f"{checks[-1].name}: {checks[-1].detail}")
        return (*checks, self._caching(dialect))

    def _mid_word(self, dialect: Dialect) -> CapabilityCheck:
        wrote = ""
        for question in probe_questions.MID_WORD:
            wrote = self._text(dialect, self._prompt(dialect, question))
            if _continues(wrote, question.expected):
                return CapabilityCheck("mid-word", True, f"{question.begun[-8:]!r} + {wrote!r}")
        raise _Unfit(f"a begun word is not continued (it wrote {_quoted(wrote)})")

    def _trailing_space(self, dialect: Dialect) -> CapabilityCheck:
        wrote = ""
        for question in probe_questions.TRAILING_SPACE:
            wrote = self._text(dialect, self._prompt(dialect, question))
            if _continues(wrote, question.expected):
                return CapabilityCheck(
                    "trailing space", True, f"{question.begun[-6:]!r} + {wrote!r}"
                )
            if _continues(wrote.lstrip(" "), question.expected):
                return CapabilityCheck(
                    "trailing space", False, "the space that ends a prompt is lost"
                )
        return CapabilityCheck("trailing space", None, f"the model wrote {_quoted(wrote)}")

    def _multi_byte(self, dialect: Dialect) -> CapabilityCheck:
        wrote = ""
        parts_lost = False
        for question in probe_questions.MULTI_BYTE:
            prompt = self._prompt(dialect, question)
            first = self._ask(dialect, prompt, 1)
            data = self._asker.reader.text_bytes(first.positions[0].token)
            if data and question.expected.encode().startswith(data):
                whole = data.decode(errors="ignore")
                return CapabilityCheck(
                    "multi-byte", True, "whole" if whole else "in parts, by bytes"
                )
            wrote = first.completion.text
            if not data:
                wrote = self._text(dialect, prompt)
                if _continues(wrote, question.expected):
                    return CapabilityCheck(
                        "multi-byte", True, "whole, after asking for more tokens"
                    )
            elif _continues(wrote, question.expected):
                return CapabilityCheck("multi-byte", True, "whole")
            parts_lost = parts_lost or self._loses_parts(dialect, prompt)
        if parts_lost:
            return CapabilityCheck(
                "multi-byte", False, "a character of several tokens is never whole"
            )
        return CapabilityCheck("multi-byte", None, f"the model wrote {_quoted(wrote)}")

    def _loses_parts(self, dialect: Dialect, prompt: Prompt) -> bool:
        """Whether as many tokens as any character has still begin with a part of one."""
        text = self._ask(dialect, prompt, _MOST_PARTS).completion.text
        return text.startswith(REPLACEMENT)

    def _consecutive(self, dialect: Dialect) -> CapabilityCheck:
        """Two calls for one token each write what one call for two tokens does."""
        prompt = self._prompt(dialect, probe_questions.COUNTING)
        both = self._ask(dialect, prompt, 2)
        first = self._ask(dialect, prompt, 1)
        wrote = self._asker.reader.text_bytes(first.positions[0].token)
        if wrote is None:
            return CapabilityCheck("two in a row", None, "the first token has no text of its own")
        second = self._ask(dialect, _longer(prompt, first.positions[0], wrote), 1)
        apart = b"".join(self._data(answer.positions[0]) for answer in (first, second))
        together = b"".join(map(self._data, both.positions)) or both.completion.text.encode()
        shown, whole = apart.decode(errors="replace"), together.decode(errors="replace")
        if apart == together:
            return CapabilityCheck("two in a row", True, repr(shown))
        return CapabilityCheck("two in a row", False, f"{shown!r}, in one call {whole!r}")

    def _ends(self, dialect: Dialect) -> CapabilityCheck:
        """At the end of its own answer the server says that it is over, without any text."""
        prompt = self._chat(dialect)
        if prompt is None:
            return CapabilityCheck("end of answer", None, "the chat template is not known")
        whole = self._ask(dialect, prompt, probe_questions.SHORT_ANSWER_TOKENS)
        if not whole.completion.ends:
            return CapabilityCheck(
                "end of answer", None, "the model had not ended after a sentence"
            )
        for entry in whole.positions[:-1] if len(whole.positions) > 1 else ():
            data = self._asker.reader.text_bytes(entry.token)
            if data is None:
                return CapabilityCheck("end of answer", None, "the answer's tokens have no text")
            prompt = _longer(prompt, entry, data)
        last = self._ask(dialect, prompt, 1).positions[0]
        if not self._asker.reader.ends(last):
            return CapabilityCheck(
                "end of answer", False, f"it wrote {_quoted(last.token.text or '')}"
            )
        return CapabilityCheck("end of answer", True, "said by finish reason")

    def _logprobs(self, dialect: Dialect) -> CapabilityCheck:
        entry = self._ask(dialect, self._prompt(dialect, probe_questions.COUNTING), 1).positions[0]
        value, top = entry.token.logprob, [other.logprob or 0.0 for other in entry.top]
        if value is None or not top:
            return CapabilityCheck("logprobs", False, "there are none")
        if abs(value - top[0]) > _SLACK:
            return CapabilityCheck(
                "logprobs", False, "the token written is not the most likely one"
            )
        if sum(map(math.exp, top)) > 1 + _SLACK:
            return CapabilityCheck("logprobs", False, "the probabilities add up to more than 1")
        return CapabilityCheck("logprobs", True, f"{len(top)} alternatives")

    def _ids(self, dialect: Dialect) -> CapabilityCheck:
        entry = self._ask(dialect, self._prompt(dialect, probe_questions.COUNTING), 1).positions[0]
        assert self._tokens is not None
        data = self._asker.reader.text_bytes(entry.token)
        ids = self._tokens.encode(
            probe_questions.COUNTING.begun + (data or b"").decode(errors="ignore")
        )
        if entry.token.token_id in ids:
            return CapabilityCheck("ids round-trip", True, f"by {self._tokens.name}")
        return CapabilityCheck(
            "ids round-trip", False, f"id {entry.token.token_id} is not that of its text"
        )

    def _caching(self, dialect: Dialect) -> CapabilityCheck:
        """Whether a prompt's second half is all that the second call has to compute."""
        question = probe_questions.COUNTING
        longer = ProbeQuestion(question.begun + " 12, 13, 14,", " 15", question.request)
        self._ask(dialect, self._prompt(dialect, question), 1)
        after = self._ask(dialect, self._prompt(dialect, longer), 1).completion
        if after.cached_tokens is None:
            return CapabilityCheck("prefix cache", None, "the server does not report it")
        detail = f"{after.cached_tokens} of {after.prompt_tokens} prompt tokens reused"
        return CapabilityCheck("prefix cache", after.cached_tokens > 0 or None, detail)

    def _prompt(self, dialect: Dialect, question: ProbeQuestion) -> Prompt:
        prompt = question.prompt(dialect.form, self._tokens)
        if prompt is None:
            raise _Unfit("the server has no tokenise route, and its tokenizer is not known")
        return prompt

    def _chat(self, dialect: Dialect) -> Prompt | None:
        messages = probe_questions.SHORT_ANSWER
        if dialect.form is PromptForm.CHAT:
            return Prompt(messages=messages)
        if self._tokens is None:
            return None
        if dialect.form is PromptForm.TEXT:
            text = self._tokens.prompt_text(messages)
            return None if text is None else Prompt(text=text.removeprefix(self._tokens.bos_text))
        try:
            return Prompt(ids=self._tokens.prompt_ids(messages))
        except LargeError:
            return None

    def _text(self, dialect: Dialect, prompt: Prompt) -> str:
        """What comes next, as many tokens of it as make up whole characters."""
        for count in range(1, _MOST_PARTS + 1):
            answered = self._ask(dialect, prompt, count)
            data = [self._asker.reader.text_bytes(entry.token) for entry in answered.positions]
            text = answered.completion.text
            if None not in data:
                text = b"".join(part for part in data if part).decode(errors="replace")
            if text and REPLACEMENT not in text:
                return text
            if answered.completion.ends:
                return text
        return ""

    def _data(self, entry: ReplyPosition) -> bytes:
        return self._asker.reader.text_bytes(entry.token) or b""

    def _ask(self, dialect: Dialect, prompt: Prompt, count: int) -> CompletionAnswer:
        """One call; _Unfit for a reply that this dialect does not explain."""
        began = time.perf_counter()
        self._calls += 1
        try:
            answered = self._asker.ask(dialect, prompt, count=count, deadline=self._deadline())
        except LargeRefused as exc:
            if exc.status in _NOT_THE_DIALECT:
                raise
            raise _Unfit(_without_address(str(exc))) from exc
        except LargeProtocolError as exc:
            raise _Unfit(_without_address(str(exc))) from exc
        if count == 1:
            self._latencies_s.append(time.perf_counter() - began)
        return answered


class NoUsableDialect(LargeProtocolError):
    """No dialect will do; `refusals` say why, the text what to try first."""

    def __init__(self, refusals: Sequence[RejectedDialect]) -> None:
        self.refusals = tuple(refusals)
        super().__init__(advice(self.refusals))


def advice(refusals: Sequence[RejectedDialect]) -> str:
    """The first thing to try when no dialect fits."""
    reasons = [refusal.reason for refusal in refusals]
    if all(" 404" in reason or "tokenise" in reason for reason in reasons):
        return "nothing at this address completes text; does it end in the API's path, as in /v1?"
    if any("not continued" in reason for reason in reasons):
        return (
            "the server starts a new answer instead of continuing one (or its model cannot finish a"
            " word); use a server with /v1/completions (vLLM, llama-server, mlx_lm.server)"
        )
    if any("logprobs" in reason for reason in reasons):
        return (
            "the server gives no logprobs on any route that continues a text; enable them, or use a"
            " server with /v1/completions (vLLM, llama-server, mlx_lm.server)"
        )
    return f"no way of asking this server for one token works ({reasons[-1]})"


def _continues(wrote: str, expected: str) -> bool:
    return bool(wrote) and (expected.startswith(wrote) or wrote.startswith(expected))


def _longer(prompt: Prompt, entry: ReplyPosition, data: bytes) -> Prompt:
    """The prompt with one more token at its end, in whatever form it has."""
    if prompt.ids:
        identity = entry.token.token_id
        if identity is None:
            raise _Unfit("the reply names no token ids")
        return Prompt(ids=(*prompt.ids, identity))
    text = data.decode(errors="replace")
    if prompt.messages:
        return Prompt(messages=prompt.messages, answer_start=prompt.answer_start + text)
    return Prompt(text=prompt.text + text)


def _quoted(text: str) -> str:
    return repr(printable_line(text, limit=40))


def _without_address(text: str) -> str:
    """The reason without the address in front, which the reader knows."""
    return re.sub(r"^https?://\S+?:? ", "", text)
