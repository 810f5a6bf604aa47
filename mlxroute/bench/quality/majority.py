"""The majority of sampled answers: a baseline that makes no call of the large model.

The small model writes several answers to a question, and the one that most of them give counts
(self-consistency, arXiv 2203.11171).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from mlxroute.bench.quality.graded_answers import QualityResults, QualityRow
from mlxroute.errors import UsageError
from mlxroute.questions.grading import extract_answer, grade
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.sequences import chunks
from mlxroute.small import SmallModel
from mlxroute.small.sampled_continuations import SampleStart, sample_continuations
from mlxroute.training.labels import decode_answer
from mlxroute.types import Progress

TEMPERATURE: Final = 0.7
"""Temperature of the sampled answers, whose tokens are drawn from the 8 likeliest."""
# Questions whose answers are in one batch.
_GROUP: Final = 16
_LABEL: Final = "sampled answers"


def can_vote(question: Question) -> bool:
    """Return whether answers to a question can be counted: choices and numbers, if known."""
    is_countable = question.kind in (AnswerKind.CHOICE, AnswerKind.NUMBER)
    return is_countable and question.answer is not None


@dataclass(frozen=True, slots=True)
class MajorityBench:
    """Lets the small model answer each question several times, and takes the majority.

    Args:
        small: The small model.
        examples: Worked examples before each question.
        count: Number of answers to a question.
        max_tokens: Maximum length of an answer.
        step_s: Seconds of a decode step.
        results: Saved majorities, which are not computed again.
    """

    small: SmallModel
    examples: Sequence[Question]
    count: int
    max_tokens: int
    step_s: float
    results: QualityResults

    def answer_all(self, questions: Sequence[Question], progress: Progress) -> list[QualityRow]:
        """Return the majority of each question's answers; all questions must fulfil `can_vote`.

        Saved ones are graded and timed anew. Raises UsageError for KV caches and models that cannot
        have rows of a batch.
        """
        small = self.small.with_own_cache()
        rows: list[QualityRow] = []
        for group in chunks(questions, _GROUP):
            progress(_LABEL, len(rows), len(questions))
            missing = [item for item in group if self.results.find(self._key(item)) is None]
            sampled = self._sample(small, missing)
            for item, (limit, answers) in zip(missing, sampled, strict=True):
                self.results.add(self._key(item), self._count(item, answers, limit=limit))
            for item in group:
                row = self.results.find(self._key(item))
                assert row is not None
                rows.append(self._judge(item, row))
        progress(_LABEL, len(rows), len(questions))
        return rows

    def _sample(
        self, small: SmallModel, questions: Sequence[Question]
    ) -> list[tuple[int, list[list[int]]]]:
        """Return the answers to each question as token ids, without end tokens.

        Before them is their maximum length, which is shorter where the context is full.
        """
        eos_ids = small.vocabulary.eos_ids
        try:
            starts = [self._start(small, question) for question in questions]
            answers = sample_continuations(small.decoder, starts, count=self.count, eos_ids=eos_ids)
        except UsageError as exc:
            raise UsageError(str(exc), parameter="majority") from exc
        return list(zip((start.limit for start in starts), answers, strict=True))

    def _start(self, small: SmallModel, question: Question) -> SampleStart:
        ids = small.encode_conversation(question_messages(question, self.examples)).ids
        # The last token of the prompt is fed by the samples, which draw their first one.
        _, layers = small.prefill_copy(ids[:-1])
        return SampleStart(
            layers=layers,
            length=len(ids) - 1,
            token_id=ids[-1],
            limit=min(self.max_tokens, small.context_length - len(ids)),
            seed=question.fingerprint,
            # To their ends, as answers of the other sides.
            is_over=lambda _: False,
            temperature=TEMPERATURE,
        )

    def _count(
        self, question: Question, answers: Sequence[Sequence[int]], *, limit: int
    ) -> QualityRow:
        """Return the row of the most frequent answer; of equal counts, the one written first.

        An answer of `limit` tokens was cut off.
        """
        texts = [decode_answer(self.small, ids) for ids in answers]
        given = [extract_answer(question, text) for text in texts]
        counts = Counter(answer for answer in given if answer)
        chosen = given.index(max(counts, key=counts.__getitem__)) if counts else 0
        return QualityRow(
            question=question.name,
            text=texts[chosen],
            strict=None,
            lenient=None,
            tokens=sum(map(len, answers)),
            escalated=0,
            agreed=0,
            unchecked=0,
            calls=0,
            uploaded_tokens=0,
            seconds=0.0,
            calls_s=0.0,
            is_cut_off=len(answers[chosen]) >= limit,
            scores=(),
        )

    def _judge(self, question: Question, row: QualityRow) -> QualityRow:
        marks = grade(question, row.text)
        seconds = round(row.tokens * self.step_s, 3)
        return replace(row, strict=marks.strict, lenient=marks.lenient, seconds=seconds)

    def _key(self, question: Question) -> str:
        """Return the key of a majority: a hash of all that it depends on."""
        conversation = question_messages(question, self.examples)
        settings = ["majority 1", self.count, TEMPERATURE, self.max_tokens]
        parts = [self.small.record_name, settings, conversation, str(question.answer)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
