"""The large model's own answers, written several at a time and without small decode steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxroute.engine import generate
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.recorded.forward_only import PlaceholderSmall
from mlxroute.recorded.parallel_answers import map_answers
from mlxroute.recorded.recording_large import AnswerNotContinued, RecordingLarge
from mlxroute.routers import always_escalate
from mlxroute.types import LargeToken, Message, Mode, Vocabulary
from mlxroute.types.limits import MAX_PREFETCH

Choices = tuple[tuple[int, float], ...]
"""Token ids of the small vocabulary, with the probabilities that the large model gives them."""


@dataclass(frozen=True, slots=True)
class LargeAnswer:
    """An answer of the large model in the small model's vocabulary.

    Args:
        token_ids: Its tokens, with the small model's own end token unless it was cut off.
        token_starts: The indices in `token_ids` at which tokens of the large model start.
        logprobs: Logprobs of these tokens in nats, NaN where the server gave none.
        choices: For each of these tokens, what the large model might have written there: the first
            tokens of this token and of its alternatives. Empty where the server gave none.
    """

    token_ids: tuple[int, ...]
    token_starts: tuple[int, ...]
    logprobs: tuple[float, ...]
    choices: tuple[Choices, ...]

    def is_whole(self, eos_ids: frozenset[int]) -> bool:
        """Return whether it ends with an end token, so that it was not cut off."""
        return not eos_ids.isdisjoint(self.token_ids[-1:])


def write_large_answers(
    small: SmallProtocol,
    large: RecordingLarge,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    at_once: int,
    on_answer: Callable[[], None],
) -> list[LargeAnswer]:
    """Return the large model's greedy answers to the conversations, in their order.

    At most `at_once` answers are written at a time; `on_answer` is called after each of them, in
    the thread that wrote it. Only the chat template and the vocabulary of `small` are used. An
    answer that the server does not go on with is asked for as a whole, as are all of a server that
    only chats; it has no logprobs and choices. Raises LargeError if the large model fails.
    """

    def write(conversation: Sequence[Message]) -> LargeAnswer:
        if not large.is_approximate:
            try:
                return _write_answer(PlaceholderSmall(small), large, conversation, max_tokens)
            except AnswerNotContinued:
                pass
        return _encode_whole_answer(small, large, conversation, max_tokens)

    return map_answers(write, conversations, large=large, at_once=at_once, on_answer=on_answer)


def _write_answer(
    small: SmallProtocol,
    large: RecordingLarge,
    conversation: Sequence[Message],
    max_tokens: int,
) -> LargeAnswer:
    answer = generate(
        small,
        large.new_view(large_only=True),
        conversation,
        router=always_escalate(),
        max_tokens=max_tokens,
        timeout_s=large.timeout_s,
        strict=True,
        mode=Mode.WAIT,
        prefetch=MAX_PREFETCH,
    )
    token_ids: list[int] = []
    token_starts: list[int] = []
    logprobs: list[float] = []
    choices: list[Choices] = []
    for token in answer:
        if token.escalation is not None:
            reply = token.escalation.large
            assert reply is not None
            token_starts.append(len(token_ids))
            logprobs.append(math.nan if reply.logprob is None else reply.logprob)
            choices.append(_first_choices(reply, small.vocabulary))
        token_ids.append(use_own_end(token.token_id, small.vocabulary))
    return LargeAnswer(tuple(token_ids), tuple(token_starts), tuple(logprobs), tuple(choices))


def use_own_end(token_id: int, vocabulary: Vocabulary) -> int:
    """Return the small model's own end token for any end token, and every other token as it is.

    A vocabulary may have several, and a server need not name the one that its model wrote.
    """
    return vocabulary.end_id if token_id in vocabulary.eos_ids else token_id


def _first_choices(large: LargeToken, vocabulary: Vocabulary) -> Choices:
    """Return the first tokens of a large token and of its alternatives, end tokens included."""
    probability = 0.0 if large.logprob is None else math.exp(large.logprob)
    if not probability or not large.top_bytes:
        return ()
    own = b"".join(map(vocabulary.token_bytes, large.token_ids))
    probabilities = {use_own_end(large.token_ids[0], vocabulary): probability}
    for data, logprob in large.top_bytes:
        text = data.decode(errors="ignore")
        # A part of a character is not text.
        if text.encode() != data or data == own:
            continue
        for token_id in vocabulary.encode(text)[:1]:
            probabilities[token_id] = probabilities.get(token_id, 0.0) + math.exp(logprob)
    if large.end_logprob is not None and vocabulary.eos_ids:
        # It holds the large token's own share where that is an end token.
        end = vocabulary.end_id
        probabilities[end] = max(probabilities.get(end, 0.0), math.exp(large.end_logprob))
    return tuple(probabilities.items())


def _encode_whole_answer(
    small: SmallProtocol, large: RecordingLarge, conversation: Sequence[Message], max_tokens: int
) -> LargeAnswer:
    """Return the large model's own answer in the tokens that the small model would write it in."""
    whole = large.write_whole_answer(conversation, max_tokens=max_tokens)
    ids = small.vocabulary.encode(whole.text)[:max_tokens]
    # A server may withhold an answer; it then has no text, and only ends.
    if not ids or (whole.ends and len(ids) < max_tokens):
        ids = (*ids, small.vocabulary.end_id)
    count = len(ids)
    return LargeAnswer(ids, tuple(range(count)), (math.nan,) * count, ((),) * count)
