"""Labels along the large model's own answers: where the small model would have written otherwise,
and where that would have changed the outcome.

The large model answers greedily; the small one reads along and says at each position what it would
write, and in which state (the labels of R2R, arXiv 2505.21600, before any judge). At each
disagreement the small model then goes on alone from its own choice. What follows from the large
model's choice there needs no continuation of its own: the small model agrees up to the next
disagreement, and from there on it is that one's continuation, or the whole answer behind the last.
One file a question is kept, so that nothing is computed twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, cast

from mlxroute.questions.grading import extract_answer, grade
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.recorded.large_answers import LargeAnswer, write
from mlxroute.recorded.replies import Replies
from mlxroute.small import CacheCopy, ScoredText, SmallModel
from mlxroute.types import LabelKind, Progress, no_progress

if TYPE_CHECKING:
    import mlx.core as mx

# Of one batch of continuations.
_ROWS: Final = 48
# So many times `at_once` answers are written before they are labelled: a few end late.
_ROUNDS: Final = 4
_ARRAYS: Final = ("hidden", "signals", "differs", "logprobs")
_ABOUT: Final = "answer"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """The positions of one answer of the large model.

    `hidden` [n, D] are final-norm states in float16, `signals` [n, 4] what a head sees besides
    (see `small.head.signal_features`), `differs` [n] is 1 where the models disagree, `logprobs`
    [n, 2] are those that the small and the large model gave the large model's token, in nats, NaN
    where the server named none. `text` is the answer, of `tokens` tokens; `alone` are, for each
    disagreement, the texts with the small model alone from its own choice there on, empty where
    they were not wanted.
    """

    hidden: mx.array
    signals: mx.array
    differs: mx.array
    logprobs: mx.array
    text: str
    tokens: int
    alone: tuple[str, ...] = ()

    def outcomes(self, question: Question) -> list[str]:
        """What is answered when the first 0, 1, ... disagreements are escalated and no more."""
        return [extract_answer(question, text) for text in (*self.alone, self.text)]

    def rights(self, question: Question) -> list[bool]:
        """Whether that is right."""
        return [grade(question, text).lenient is True for text in (*self.alone, self.text)]

    def targets(self, question: Question, labels: LabelKind) -> list[float]:
        """1 for each position that is to be found, else 0."""
        differs = [bool(value) for value in _column(self.differs)]
        if labels in (LabelKind.DIVERGENCE, LabelKind.DEFERRAL):
            return [float(each) for each in differs]
        if labels is LabelKind.CONSEQUENCE:
            pairs = itertools.pairwise(self.outcomes(question))
            matters = iter([small != large for small, large in pairs])
        else:
            rights = itertools.pairwise(self.rights(question))
            matters = iter([large and not small for small, large in rights])
        return [float(each and next(matters)) for each in differs]


def collect_labels(  # noqa: PLR0913 - what a run is made of
    small: SmallModel,
    replies: Replies,
    questions: Sequence[Question],
    *,
    examples: Sequence[Question],
    tokens: int,
    folder: Path,
    at_once: int = 1,
    continuing: bool = True,
    progress: Progress = no_progress,
) -> list[LabelledAnswer]:
    """Label the large model's answers to the questions, from `folder` where they are there.

    At most `at_once` calls are under way; `continuing` adds the small model's continuations. Raises
    LargeError when the large model fails; what was labelled before is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = itertools.count()
    progress("questions", next(done), len(questions))
    files = [
        folder / f"{_key(small, replies, question, examples, tokens)}.safetensors"
        for question in questions
    ]
    missing = [
        (question, file)
        for question, file in zip(questions, files, strict=True)
        if not file.exists() or (continuing and not _is_continued(file))
    ]
    for _ in range(len(questions) - len(missing)):
        progress("questions", next(done), len(questions))
    for group in _chunks(missing, _ROUNDS * at_once):
        wanted = [question for question, _ in group]
        written = write(
            small,
            replies,
            wanted,
            examples=examples,
            tokens=tokens,
            at_once=at_once,
            done=lambda: progress("questions", next(done), len(questions)),
        )
        labelled = _labelled(small, wanted, written, examples, tokens, continuing=continuing)
        for (_, file), each in zip(group, labelled, strict=True):
            _write(each, file)
    return [_read(file) for file in files]


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _key(
    small: SmallModel,
    replies: Replies,
    question: Question,
    examples: Sequence[Question],
    tokens: int,
) -> str:
    turns = question_messages(question, examples)
    key = json.dumps([small.name, replies.model_name, turns, tokens])
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Fork:
    """The small model's own way from a disagreement on: what comes before it, and its choice.

    `answer` is the number of the answer among those that are continued together.
    """

    answer: int
    before: tuple[int, ...]
    token_id: int
    held: CacheCopy


def _labelled(
    small: SmallModel,
    questions: Sequence[Question],
    answers: Sequence[LargeAnswer],
    examples: Sequence[Question],
    tokens: int,
    *,
    continuing: bool,
) -> Iterator[LabelledAnswer]:
    """Read the answers, then go on from their disagreements, as soon as these fill a batch."""
    found: list[LabelledAnswer] = []
    forks: list[_Fork] = []
    for question, answer in zip(questions, answers, strict=True):
        prompt_ids = small.encode_prompt(small.render(question_messages(question, examples)))
        reading = small.score_text(prompt_ids, answer.token_ids)
        places = _disagreements(answer, reading)
        if continuing:
            for at in places:
                if at is not None:
                    held = small.copy_cache(len(prompt_ids) + at)
                    own = reading.signals[at].token_id
                    forks.append(_Fork(len(found), answer.token_ids[:at], own, held))
        found.append(_compared(small, answer, reading, places))
        if len(forks) >= _ROWS:
            yield from _with_ways(small, found, forks, tokens)
            found, forks = [], []
    yield from _with_ways(small, found, forks, tokens)


def _with_ways(
    small: SmallModel, answers: Sequence[LabelledAnswer], forks: Sequence[_Fork], tokens: int
) -> Iterator[LabelledAnswer]:
    """The answers with the texts that their forks lead to."""
    alone: list[list[str]] = [[] for _ in answers]
    for fork, text in zip(forks, _continued(small, forks, tokens), strict=True):
        alone[fork.answer].append(text)
    for labelled, texts in zip(answers, alone, strict=True):
        yield replace(labelled, alone=tuple(texts))


def _parts(answer: LargeAnswer) -> list[range]:
    """The ids of each of the large model's tokens."""
    return [range(*pair) for pair in itertools.pairwise((*answer.firsts, len(answer.token_ids)))]


def _disagreements(answer: LargeAnswer, reading: ScoredText) -> list[int | None]:
    """For each of the large model's tokens, its first id that the small one would not write."""
    return [
        next((i for i in part if reading.signals[i].token_id != answer.token_ids[i]), None)
        for part in _parts(answer)
    ]


def _compared(
    small: SmallModel, answer: LargeAnswer, reading: ScoredText, places: Sequence[int | None]
) -> LabelledAnswer:
    import mlx.core as mx

    signals = [reading.signals[first] for first in answer.firsts]
    given = [sum(reading.logprobs[i] for i in part) for part in _parts(answer)]
    hidden = reading.hidden[mx.array(list(answer.firsts))].astype(mx.float16)
    mx.eval(hidden)
    return LabelledAnswer(
        hidden=hidden,
        signals=mx.array(
            [[s.entropy_nats, s.varentropy, s.top_logprobs[0], s.margin] for s in signals]
        ),
        differs=mx.array([float(at is not None) for at in places]),
        logprobs=mx.array(list(zip(given, answer.logprobs, strict=True))),
        text=_text(small, answer.token_ids),
        tokens=len(answer.token_ids),
    )


def _continued(small: SmallModel, forks: Sequence[_Fork], tokens: int) -> Iterator[str]:
    """The whole answers that the forks lead to."""
    ends = small.vocabulary.eos_ids
    for group in _chunks(forks, _ROWS):
        room = [0 if fork.token_id in ends else tokens - len(fork.before) - 1 for fork in group]
        tails = small.continue_greedily(
            [(fork.held, fork.token_id) for fork in group], max_tokens=room
        )
        for fork, tail in zip(group, tails, strict=True):
            yield _text(small, (*fork.before, fork.token_id, *tail))


def _text(small: SmallModel, token_ids: Sequence[int]) -> str:
    """The text of an answer, without its end token."""
    ends = small.vocabulary.eos_ids
    data = b"".join(small.vocabulary.token_bytes(each) for each in token_ids if each not in ends)
    return data.decode(errors="replace")


def _column(values: mx.array) -> list[float]:
    return cast("list[float]", values.tolist())


def _write(labelled: LabelledAnswer, file: Path) -> None:
    """Whole or not at all, whenever it is interrupted."""
    import mlx.core as mx

    about = {"text": labelled.text, "tokens": labelled.tokens, "alone": labelled.alone}
    arrays = {name: getattr(labelled, name) for name in _ARRAYS}
    partial = file.with_suffix(".partial.safetensors")
    mx.save_safetensors(str(partial), arrays, {_ABOUT: json.dumps(about)})
    partial.rename(file)


def _is_continued(file: Path) -> bool:
    """Whether the small model went on alone from every disagreement."""
    found = _read(file)
    return len(found.alone) == sum(_column(found.differs))


def _read(file: Path) -> LabelledAnswer:
    import mlx.core as mx

    arrays, about = mx.load(str(file), return_metadata=True)
    assert isinstance(arrays, dict)
    assert isinstance(about, dict)
    told = json.loads(about[_ABOUT])
    return LabelledAnswer(
        **arrays, text=told["text"], tokens=told["tokens"], alone=tuple(told["alone"])
    )
