"""Checks of one dialect: whether the server answers requests for single tokens correctly."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import Final

from mlxroute.errors import LargeError, LargeNotContinued, LargeProtocolError, LargeRefused
from mlxroute.large.completion_request import CompletionRequest, CompletionRequester
from mlxroute.large.dialects import Dialect
from mlxroute.large.dialects.chat.chat_reply import ModelThinks
from mlxroute.large.dialects.chat.request_fields import names_field
from mlxroute.large.http.deadline import NextDeadline
from mlxroute.large.negotiation import probe_questions
from mlxroute.large.negotiation.continuation_questions import CONTINUATIONS, FINISHED
from mlxroute.large.negotiation.probe_questions import ProbeQuestion
from mlxroute.large.negotiation.rejection import DialectRejected, RejectionKind, lacks_root
from mlxroute.large.negotiation.served_models import ModelName
from mlxroute.large.negotiation.verdict_file import CapabilityCheck
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import CompletionAnswer, ReplyPosition
from mlxroute.large.vocabulary.token_reader import REPLACEMENT, TokenReader
from mlxroute.large.vocabulary.token_sources import TokenSource
from mlxroute.safe_text import printable_line

# Also the status of a refusal of logprobs.
_FORBIDDEN: Final = 403
_LOGPROB_TOLERANCE: Final = 1e-3
# The share of continuations that a server needs right if it is asked by example.
_MIN_SCORE: Final = 0.75


class CapabilityChecker:
    """Asks a server questions in one dialect and compares the replies with the expected ones.

    Methods raise DialectRejected, and LargeError for failures that the dialect did not cause.

    Args:
        requester: Sends the questions.
        dialect: The dialect to ask them in.
        model: The name of the model, as far as it is known.
        reader: Reads the bytes of the tokens in replies.
        tokens: Gives token ids for prompts; None if there is no source.
        next_deadline: Returns the deadline of each request.

    Attributes:
        latencies_s: The latencies of the requests for one token, in seconds.
        requests: The number of requests sent.
    """

    def __init__(
        self,
        requester: CompletionRequester,
        dialect: Dialect,
        *,
        model: ModelName,
        reader: TokenReader,
        tokens: TokenSource | None,
        next_deadline: NextDeadline,
    ) -> None:
        self._requester = requester
        self._dialect = dialect
        self._model = model
        self._reader = reader
        self._tokens = tokens
        self._next_deadline = next_deadline
        self.latencies_s: list[float] = []
        self.requests = 0

    def check_all(self) -> tuple[CapabilityCheck, ...]:
        """Return the outcome of all checks; raise DialectRejected at the first that fails."""
        if self._dialect.is_approximate:
            return (*self._scored_checks(), self._check_logprobs(), self._check_prefix_cache())
        return (*self._required_checks(), self._check_prefix_cache())

    def _scored_checks(self) -> tuple[CapabilityCheck, ...]:
        """Check continuations of all kinds; raise DialectRejected if too few are right."""
        checks = [self._check_place(name, question) for name, question in CONTINUATIONS]
        checks.append(self._check_finished_answer())
        right = sum(check.passed is True for check in checks)
        score = f"{right} of {len(checks)} partial answers were continued correctly"
        if right < _MIN_SCORE * len(checks):
            first = next(check for check in checks if not check.passed)
            raise DialectRejected(
                f"only {score} ({first.name}: {first.detail})", kind=RejectionKind.NOT_BY_EXAMPLE
            )
        return (CapabilityCheck("score", True, score), *checks)

    def _check_place(self, name: str, question: ProbeQuestion) -> CapabilityCheck:
        """Check that the server goes on with an answer that ends at a place of one kind."""
        text = self._continuation(self._prompt(question))
        detail = f"{question.text[-8:]!r} + {text[:40]!r}" if text else "it did not go on"
        return CapabilityCheck(name, _agrees(text, question.expected), detail)

    def _check_finished_answer(self) -> CapabilityCheck:
        """Check that the server adds nothing to an answer that is complete."""
        name = "end of answer"
        prompt = self._prompt(FINISHED)
        try:
            position = self._ask(prompt, 1).positions[0]
        except DialectRejected as exc:
            if not isinstance(exc.error, LargeNotContinued):
                raise
            return CapabilityCheck(name, False, "it did not go on")
        if self._reader.ends(position):
            return CapabilityCheck(name, True, "said by finish reason")
        return CapabilityCheck(name, False, f"it wrote {_quoted(position.token.text or '')}")

    def _required_checks(self) -> Iterator[CapabilityCheck]:
        yield self.check_mid_word()
        logprobs = self._check_logprobs()
        if not logprobs.passed and self._dialect.names_tokens:
            raise DialectRejected(f"logprobs: {logprobs.detail}", kind=RejectionKind.NO_LOGPROBS)
        yield logprobs
        checks = [self._check_trailing_space, self._check_multi_byte]
        checks += [self._check_consecutive_requests, self._check_end_of_answer]
        if self._dialect.form is PromptForm.IDS:
            checks.append(self._check_ids)
        if not self._dialect.names_tokens:
            checks.append(self._check_leading_space)
        for check in checks:
            outcome = check()
            if outcome.passed is False:
                raise DialectRejected(f"{outcome.name}: {outcome.detail}")
            yield outcome

    def check_mid_word(self) -> CapabilityCheck:
        """Check that the server continues an unfinished word."""
        text = ""
        for question in probe_questions.MID_WORD:
            text = self._continuation(self._prompt(question))
            if _agrees(text, question.expected):
                return CapabilityCheck("mid-word", True, f"{question.text[-8:]!r} + {text!r}")
        raise DialectRejected(
            f"an unfinished word is not continued (it wrote {_quoted(text)})",
            kind=RejectionKind.NOT_CONTINUED,
        )

    def request_tokens(self, question: ProbeQuestion, count: int) -> None:
        """Request tokens, from whose names the reader learns the vocabulary."""
        self._ask(self._prompt(question), count)

    def count_tokens(self, text: str) -> int | None:
        """Return the tokens of a prompt of text; None if the server does not count them."""
        return self._ask(Prompt(text=text), 1).completion.prompt_tokens

    def _check_trailing_space(self) -> CapabilityCheck:
        """Check that a space at the end of the prompt is kept."""
        name = "trailing space"
        text = ""
        for question in probe_questions.TRAILING_SPACE:
            text = self._continuation(self._prompt(question))
            if _agrees(text, question.expected):
                return CapabilityCheck(name, True, f"{question.text[-6:]!r} + {text!r}")
            if _agrees(text.lstrip(" "), question.expected):
                return CapabilityCheck(name, False, "the space that ends a prompt is lost")
        return CapabilityCheck(name, None, f"the model wrote {_quoted(text)}")

    def _check_leading_space(self) -> CapabilityCheck:
        """Check that a space at the beginning of a reply is kept, which no token's name shows."""
        name, question = "leading space", probe_questions.COUNTING
        text = self._continuation(self._prompt(question))
        if _agrees(text, question.expected.lstrip()):
            return CapabilityCheck(name, False, "the space that begins a reply is lost")
        passed = _agrees(text, question.expected) or None
        return CapabilityCheck(name, passed, f"the model wrote {_quoted(text)}")

    def _check_multi_byte(self) -> CapabilityCheck:
        """Check that a character of several tokens can be read, by bytes or in a longer reply."""
        name = "multi-byte"
        text = ""
        is_broken = False
        for question in probe_questions.MULTI_BYTE:
            prompt = self._prompt(question)
            first = self._ask(prompt, 1)
            data = self._reader.text_bytes(first.positions[0].token)
            if data and question.expected.encode().startswith(data):
                is_whole = bool(data.decode(errors="ignore"))
                return CapabilityCheck(name, True, "whole" if is_whole else "in parts, by bytes")
            text = first.completion.text
            if not data:
                text = self._continuation(prompt)
                if _agrees(text, question.expected):
                    return CapabilityCheck(name, True, "whole, after asking for more tokens")
            elif _agrees(text, question.expected):
                return CapabilityCheck(name, True, "whole")
            is_broken = is_broken or self._breaks_characters(prompt)
        if is_broken:
            return CapabilityCheck(name, False, "a character of several tokens is never whole")
        return CapabilityCheck(name, None, f"the model wrote {_quoted(text)}")

    def _breaks_characters(self, prompt: Prompt) -> bool:
        """Return whether even the tokens of a whole character are decoded as a broken one."""
        text = self._ask(prompt, probe_questions.TOKENS_FOR_NEXT_CHARACTER).completion.text
        return text.startswith(REPLACEMENT)

    def _check_consecutive_requests(self) -> CapabilityCheck:
        """Check that two requests for one token give the same text as one request for two."""
        name = "two in a row"
        prompt = self._prompt(probe_questions.COUNTING)
        both = self._ask(prompt, 2)
        first = self._ask(prompt, 1)
        data = self._reader.text_bytes(first.positions[0].token)
        if data is None:
            return CapabilityCheck(name, None, "the first token has no text of its own")
        second = self._ask(_append(prompt, first.positions[0], data), 1)
        separate = self._all_bytes(first) + self._all_bytes(second)
        joint = self._all_bytes(both) or both.completion.text.encode()
        shown = repr(separate.decode(errors="replace"))
        if separate == joint:
            return CapabilityCheck(name, True, shown)
        other = repr(joint.decode(errors="replace"))
        return CapabilityCheck(name, False, f"{shown}, in one call {other}")

    def _check_end_of_answer(self) -> CapabilityCheck:
        """Check that the end of an answer is reported where the model's own answer ends."""
        name = "end of answer"
        prompt = self._chat_prompt()
        if prompt is None:
            return CapabilityCheck(name, None, "the chat template is not known")
        answer = self._ask(prompt, probe_questions.SHORT_ANSWER_TOKENS)
        if not answer.completion.ends:
            return CapabilityCheck(name, None, "the model had not ended after a sentence")
        for position in answer.positions[:-1]:
            data = self._reader.text_bytes(position.token)
            if data is None:
                return CapabilityCheck(name, None, "the answer's tokens have no text")
            prompt = _append(prompt, position, data)
        last = self._ask(prompt, 1).positions[0]
        if not self._reader.ends(last):
            return CapabilityCheck(name, False, f"it wrote {_quoted(last.token.text or '')}")
        return CapabilityCheck(name, True, f"said by {'finish reason' if last.ends else 'its id'}")

    def _check_logprobs(self) -> CapabilityCheck:
        """Check that logprobs are given and are those of a greedy choice."""
        name = "logprobs"
        position = self._first_position(self._prompt(probe_questions.COUNTING))
        logprob = position.token.logprob
        top = [token.logprob or 0.0 for token in position.top]
        if logprob is None or not top:
            return CapabilityCheck(name, False, "there are none")
        if abs(logprob - top[0]) > _LOGPROB_TOLERANCE:
            return CapabilityCheck(name, False, "the token written is not the most likely one")
        if sum(map(math.exp, top)) > 1 + _LOGPROB_TOLERANCE:
            return CapabilityCheck(name, False, "the probabilities add up to more than 1")
        return CapabilityCheck(name, True, f"{len(top)} alternatives")

    def _check_ids(self) -> CapabilityCheck:
        """Check that a generated token has the id that its text is encoded as."""
        name = "ids round-trip"
        token = self._ask(self._prompt(probe_questions.COUNTING), 1).positions[0].token
        assert self._tokens is not None
        text = (self._reader.text_bytes(token) or b"").decode(errors="ignore")
        if token.token_id in self._tokens.encode(probe_questions.COUNTING.text + text):
            return CapabilityCheck(name, True, f"by {self._tokens.name}")
        return CapabilityCheck(name, False, f"id {token.token_id} is not that of its text")

    def _check_prefix_cache(self) -> CapabilityCheck:
        """Check whether a longer prompt reuses the KV cache of its beginning; never rejects."""
        name = "prefix cache"
        question = probe_questions.COUNTING
        longer = ProbeQuestion(question.text + " 12, 13, 14,", " 15", question.chat_request)
        self._ask(self._prompt(question), 1)
        completion = self._ask(self._prompt(longer), 1).completion
        if completion.cached_tokens is None:
            return CapabilityCheck(name, None, "the server does not report it")
        detail = f"{completion.cached_tokens} of {completion.prompt_tokens} prompt tokens reused"
        return CapabilityCheck(name, completion.cached_tokens > 0 or None, detail)

    def _prompt(self, question: ProbeQuestion) -> Prompt:
        prompt = question.prompt(self._dialect.form, self._tokens)
        if prompt is None:
            raise DialectRejected(
                "the server has no tokenise route, and its tokenizer is not known",
                kind=RejectionKind.NO_TOKENIZER,
            )
        return prompt

    def _chat_prompt(self) -> Prompt | None:
        """Return a chat prompt with a short answer; None if the template is not known."""
        messages = probe_questions.SHORT_ANSWER
        if self._dialect.form is PromptForm.CHAT:
            return Prompt(messages=messages)
        if self._tokens is None:
            return None
        if self._dialect.form is PromptForm.TEXT:
            rendered = self._tokens.prompt_text(messages)
            if rendered is None:
                return None
            return Prompt(text=rendered.text.removeprefix(self._tokens.bos_text))
        try:
            return Prompt(ids=self._tokens.prompt_ids(messages))
        except LargeError:
            return None

    def _continuation(self, prompt: Prompt) -> str:
        """Return the next text, of the fewest tokens that end on a whole character.

        It is empty if the reply does not go on with the answer so far.
        """
        for count in range(1, probe_questions.TOKENS_FOR_NEXT_CHARACTER + 1):
            try:
                answer = self._ask(prompt, count)
            except DialectRejected as exc:
                if not isinstance(exc.error, LargeNotContinued):
                    raise
                return ""
            data = [self._reader.text_bytes(position.token) for position in answer.positions]
            text = answer.completion.text
            if None not in data:
                text = b"".join(part for part in data if part).decode(errors="replace")
            if (text and REPLACEMENT not in text) or answer.positions[-1].ends:
                return text
        return ""

    def _first_position(self, prompt: Prompt) -> ReplyPosition:
        """Return the next position, of the fewest tokens of which the first has a text."""
        for count in range(1, probe_questions.TOKENS_FOR_NEXT_CHARACTER + 1):
            position = self._ask(prompt, count).positions[0]
            # By example, a reply may end before its first new token.
            if self._reader.ends(position) or self._reader.text_bytes(position.token) is not None:
                break
        return position

    def _all_bytes(self, answer: CompletionAnswer) -> bytes:
        tokens = [position.token for position in answer.positions]
        return b"".join(self._reader.text_bytes(token) or b"" for token in tokens)

    def _ask(self, prompt: Prompt, count: int) -> CompletionAnswer:
        """Send one request, and again if the reply does not fit: one bad reply shows little.

        Raises DialectRejected if the server refuses it, or if the second reply does not fit either.
        """
        for is_last in (False, True):
            try:
                return self._send(prompt, count)
            except (ModelThinks, LargeNotContinued) as exc:
                error: LargeError = exc
                break
            except LargeProtocolError as exc:
                error = exc
            except LargeRefused as exc:
                error = exc
                # An error in a body may be transient, and was not repeated yet.
                if exc.in_body and not is_last:
                    continue
                if not self._is_rejection(exc):
                    raise
                break
        raise DialectRejected(_without_address(str(error)), error=error) from error

    def _is_rejection(self, error: LargeRefused) -> bool:
        """Return whether the dialect may have caused a refusal; telling may take one request."""
        is_root = self._dialect.at_root
        if error.may_pass:
            return is_root and lacks_root(error, self._model, self._requester, self._next_deadline)
        is_about_field = error.status == _FORBIDDEN and names_field(str(error))
        # Proxies may forbid other paths; many servers answer 500 to a body unknown to them.
        return is_root or is_about_field or not error.is_access

    def _send(self, prompt: Prompt, count: int) -> CompletionAnswer:
        request = CompletionRequest(
            self._dialect, prompt, self._model.for_requests(self._dialect), count
        )
        self.requests += 1
        began_s = time.perf_counter()
        answer = self._requester.complete(request, deadline=self._next_deadline())
        if count == 1:
            self.latencies_s.append(time.perf_counter() - began_s)
        return answer


def _agrees(text: str, expected: str) -> bool:
    """Return whether one text is the beginning of the other."""
    return bool(text) and (expected.startswith(text) or text.startswith(expected))


def _append(prompt: Prompt, position: ReplyPosition, data: bytes) -> Prompt:
    """Return the prompt with one more token, whose bytes are `data`, at its end."""
    if prompt.ids:
        token_id = position.token.token_id
        if token_id is None:
            raise DialectRejected("the reply names no token ids")
        return Prompt(ids=(*prompt.ids, token_id))
    text = data.decode(errors="replace")
    if prompt.messages:
        return Prompt(messages=prompt.messages, answer_start=prompt.answer_start + text)
    return Prompt(text=prompt.text + text)


def _quoted(text: str) -> str:
    return repr(printable_line(text, limit=40))


def _without_address(text: str) -> str:
    return re.sub(r"^https?://\S+?:? ", "", text)
