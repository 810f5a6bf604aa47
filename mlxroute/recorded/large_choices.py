"""The large model's own choice at each position of answers that another model wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.engine.protocols import SmallProtocol
from mlxroute.engine.transcript import Transcript, render_prompt
from mlxroute.errors import LargeProtocolError
from mlxroute.recorded.large_answers import use_own_end
from mlxroute.recorded.parallel_answers import map_answers
from mlxroute.recorded.recording_large import RecordedLargeView, RecordingLarge
from mlxroute.types import LargeContext, LargeToken, Message

# Tokens after a disagreement are of no use, so a call asks for fewer than it may.
_PREFETCH: Final = 16


@dataclass(frozen=True, slots=True)
class WrittenAnswer:
    """An answer in the small model's vocabulary.

    Args:
        conversation: The conversation that it answers.
        token_ids: Its tokens, without the end token.
        is_whole: Whether an end token followed.
    """

    conversation: Sequence[Message]
    token_ids: Sequence[int]
    is_whole: bool

    @property
    def positions(self) -> int:
        """The number of tokens, with the end token."""
        return len(self.token_ids) + self.is_whole


def find_large_choices(
    small: SmallProtocol,
    large: RecordingLarge,
    answers: Sequence[WrittenAnswer],
    *,
    at_once: int,
    on_answer: Callable[[], None],
) -> list[list[int]]:
    """Return, for each position of the answers, the token that the large model would write there.

    Where the large model's token is spelled as several of the small one, this is the first that
    differs; where the large model ends, it is the small model's own end token. A call ends at a
    disagreement or after 17 tokens, so an answer takes at most one call for each disagreement, one
    for every 17 tokens, and one more; without prefetch, one for every token. An answer that the
    server cannot continue at some position has no choices from there on. `at_once` and `on_answer`
    as in `write_large_answers`. Raises LargeError if the large model fails otherwise.
    """

    def choose(answer: WrittenAnswer) -> list[int]:
        return _find_choices(small, large, answer)

    return map_answers(choose, answers, large=large, at_once=at_once, on_answer=on_answer)


def _find_choices(small: SmallProtocol, large: RecordingLarge, answer: WrittenAnswer) -> list[int]:
    view = large.new_view()
    transcript = Transcript(render_prompt(small, answer.conversation))
    choices: list[int] = []
    while len(choices) < answer.positions:
        begin = len(choices)
        prefetch = min(_PREFETCH, answer.positions - begin - 1)
        try:
            tokens = _call(view, transcript.context(), prefetch, large.timeout_s)
        except LargeProtocolError:
            # Some texts of the small model are spelled otherwise by the server.
            return choices
        new_ids = _choices_until_disagreement(tokens, answer, begin)
        choices += [use_own_end(token_id, small.vocabulary) for token_id in new_ids]
        for token_id in answer.token_ids[begin : len(choices)]:
            transcript = transcript.extend((token_id,), ends=False)
    return choices


def _choices_until_disagreement(
    tokens: Sequence[LargeToken], answer: WrittenAnswer, begin: int
) -> list[int]:
    """Return the ids of the tokens up to the first that differs from the answer at `begin`."""
    rest = answer.token_ids[begin:]
    ids = [token_id for token in tokens for token_id in token.token_ids]
    # The last token may be spelled as more ids than the answer has positions.
    ids = ids[: answer.positions - begin]
    for number, token_id in enumerate(ids):
        if number >= len(rest) or rest[number] != token_id:
            return ids[: number + 1]
    return ids


def _call(
    view: RecordedLargeView, context: LargeContext, prefetch: int, timeout_s: float
) -> tuple[LargeToken, ...]:
    call = view.begin(context, deadline_s=timeout_s, prefetch=prefetch)
    try:
        view.wait(lambda: call.ready, timeout_s=timeout_s)
        return call.result()
    except BaseException:
        call.cancel()
        raise
