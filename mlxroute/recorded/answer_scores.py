"""How likely the large model finds answers, recorded on disk: no answer is scored twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlxroute.engine.protocols import SmallProtocol
from mlxroute.engine.transcript import Transcript, render_prompt
from mlxroute.errors import LargeProtocolError
from mlxroute.recorded.record_file import append_records, read_records
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.recorded.reply_records import ids_key
from mlxroute.types import Message, Progress

# A server that scores no answer to so many questions is asked for no more. The answers to one
# question often share the character that a server cannot score.
_FIRST_QUESTIONS: Final = 3
_LABEL: Final = "answers scored"


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """The large model's logprob of an answer in nats, and its number of the large model's tokens.

    An answer without text has neither.
    """

    logprob: float = 0.0
    tokens: int = 0

    @property
    def token_logprob(self) -> float | None:
        """The mean logprob of a token; None for an answer without text."""
        return self.logprob / self.tokens if self.tokens else None


class AnswerScores:
    """A file of scores, by the token ids of prompt and answer in the small model's vocabulary.

    It belongs to one pair of models.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scores = dict(read_records(path, _keyed_score))

    def find(self, key: str) -> AnswerScore | None:
        """Return the score recorded under a key; None if there is none."""
        return self._scores.get(key)

    def add(self, key: str, score: AnswerScore) -> None:
        """Record a score."""
        self._scores[key] = score
        item = {"key": key, "logprob": score.logprob, "tokens": score.tokens}
        append_records(self._path, [item])


def score_answers(
    small: SmallProtocol,
    large: RecordingLarge,
    scores: AnswerScores,
    answers: Sequence[tuple[Sequence[Message], str]],
    *,
    progress: Progress,
) -> tuple[list[AnswerScore | None], str | None]:
    """Return the large model's score of each answer, a pair of conversation and text.

    A score is None where the server gives no logprobs; the second value is the first reason for
    that, None if there is no such answer. The answers are scored one after the other, because some
    servers take a request for each token and have only the prompt of one answer in their cache.
    Raises LargeError if the large model fails otherwise.
    """
    results: list[AnswerScore | None] = []
    reasons: list[str] = []
    failed_questions: set[str] = set()
    has_scored = False
    for number, (conversation, text) in enumerate(answers):
        progress(_LABEL, number, len(answers))
        prompt = Transcript(render_prompt(small, conversation))
        ids = small.vocabulary.encode(text)
        answered = prompt.extend(ids, ends=False).context()
        key = ids_key(answered.token_ids)
        score = scores.find(key) if ids else AnswerScore()
        has_scored = has_scored or (bool(ids) and score is not None)
        if score is None and (has_scored or len(failed_questions) < _FIRST_QUESTIONS):
            context = prompt.context()
            try:
                logprobs = large.score(context, answered)
                score = AnswerScore(sum(logprobs), len(logprobs))
                scores.add(key, score)
                has_scored = True
            except LargeProtocolError as exc:
                reasons.append(str(exc))
                failed_questions.add(ids_key(context.token_ids))
        results.append(score)
    progress(_LABEL, len(answers), len(answers))
    return results, reasons[0] if reasons else None


def _keyed_score(item: Any) -> tuple[str, AnswerScore]:
    return str(item["key"]), AnswerScore(float(item["logprob"]), int(item["tokens"]))
