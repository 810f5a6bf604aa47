"""Labels of the large model's answers: where the models disagree, and where that matters.

The large model answers greedily. The small model reads the answer and gives, at each position, its
own choice and its hidden state (the labels of R2R, arXiv 2505.21600, before its judge). From each
disagreement the small model then continues the answer alone, starting with its own choice. The
large model's choice there needs no continuation: the models agree up to the next disagreement, so
the text is that of the next continuation, or the large model's answer after the last disagreement.
The result for each question is saved in a file of its own, so that no work is repeated.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import mlx.core as mx

from mlxroute.errors import UsageError
from mlxroute.questions.grading import extract_answer, grade
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.recorded.large_answers import LargeAnswer, write_large_answers
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.sequences import chunks
from mlxroute.small import SmallModel
from mlxroute.small.decoder import ScoredText
from mlxroute.small.kv_cache import CacheLayers
from mlxroute.training.tensor_files import write_tensors
from mlxroute.types import LabelKind, Message, Progress, no_progress
from mlxroute.untrusted_text import parse_json

# Rows of a batch of continuations.
_BATCH_ROWS: Final = 48
# Answers differ in length; with several per call slot no slot is idle for long.
_ANSWERS_PER_SLOT: Final = 4
_METADATA_KEY: Final = "answer"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """The n positions of one answer of the large model.

    Args:
        hidden: Final hidden states in float16, [n, D].
        features: The other inputs of a head (see `small.mlp_head.signal_features`), [n, 4].
        differs: 1 where the models disagree, else 0, [n].
        logprobs: The small and the large model's logprobs of the large model's token, in nats, NaN
            where the server gave none, [n, 2].
        text: The answer.
        token_count: Its length in tokens.
        continuations: The whole texts that result if the small model continues alone from each
            disagreement; empty if they were not made.
    """

    hidden: mx.array
    features: mx.array
    differs: mx.array
    logprobs: mx.array
    text: str
    token_count: int
    continuations: tuple[str, ...] = ()

    @property
    def has_logprobs(self) -> bool:
        """Whether the large model's logprobs are known at every position."""
        return bool(mx.isfinite(self.logprobs[:, 1]).all())

    def find_outcomes(self, question: Question) -> list[str]:
        """Return the extracted answers with the first 0, 1, ... disagreements escalated."""
        return [extract_answer(question, text) for text in (*self.continuations, self.text)]

    def find_correct(self, question: Question) -> list[bool]:
        """Return whether each of these answers is right, in the order of `find_outcomes`."""
        return [grade(question, text).lenient is True for text in (*self.continuations, self.text)]

    def make_targets(self, question: Question, labels: LabelKind) -> list[float]:
        """Return 1 for each position that a router should escalate, else 0.

        Consequence: the outcome differs with the choice there. Preference: the outcome is right
        with the large model's choice only (CITER, arXiv 2502.01976). Otherwise: the models differ.
        """
        assert labels is not LabelKind.ADVANTAGE, "those are made on routed answers"
        differs = [bool(value) for value in to_list(self.differs)]
        if labels in (LabelKind.DIVERGENCE, LabelKind.DEFERRAL):
            return [float(differing) for differing in differs]
        if labels is LabelKind.CONSEQUENCE:
            outcomes = itertools.pairwise(self.find_outcomes(question))
            matters = iter([small != large for small, large in outcomes])
        else:
            correct = itertools.pairwise(self.find_correct(question))
            matters = iter([large and not small for small, large in correct])
        return [float(differing and next(matters)) for differing in differs]


def collect_labels(  # noqa: PLR0913 - all of these are settings of one run
    small: SmallModel,
    large: RecordingLarge,
    questions: Sequence[Question],
    *,
    examples: Sequence[Question],
    max_tokens: int,
    folder: Path,
    at_once: int = 1,
    with_continuations: bool = True,
    progress: Progress = no_progress,
) -> list[LabelledAnswer]:
    """Return labels of the large model's answers to the questions, from `folder` or made now.

    `examples` are worked examples that precede each question. At most `at_once` calls are in
    flight. `with_continuations` adds the small model's continuations. Raises LargeError when the
    large model fails; labels made until then stay saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = itertools.count()
    progress("questions", next(done), len(questions))
    conversations = [question_messages(question, examples) for question in questions]
    files = [
        folder / f"{_file_key(small, large, conversation, max_tokens)}.safetensors"
        for conversation in conversations
    ]
    # Kept in memory: another run may replace the files by labels without continuations.
    labels: dict[Path, LabelledAnswer] = {}
    for file in files:
        saved = _read_saved(file, with_continuations=with_continuations)
        if saved is not None:
            labels[file] = saved
    missing = [
        (conversation, file)
        for conversation, file in zip(conversations, files, strict=True)
        if file not in labels
    ]
    for _ in range(len(questions) - len(missing)):
        progress("questions", next(done), len(questions))
    for group in chunks(missing, _ANSWERS_PER_SLOT * at_once):
        labels |= _label_files(
            small,
            large,
            group,
            max_tokens,
            at_once=at_once,
            with_continuations=with_continuations,
            on_answer=lambda: progress("questions", next(done), len(questions)),
        )
    return [labels[file] for file in files]


def _label_files(
    small: SmallModel,
    large: RecordingLarge,
    group: Sequence[tuple[Sequence[Message], Path]],
    max_tokens: int,
    *,
    at_once: int,
    with_continuations: bool,
    on_answer: Callable[[], None],
) -> dict[Path, LabelledAnswer]:
    """Return labels of the answers to conversations; save them in the file paired with each.

    A file that has continuations meanwhile, from another run, is kept if the labels have none.
    """
    conversations = [conversation for conversation, _ in group]
    answers = write_large_answers(
        small,
        large,
        conversations,
        max_tokens=max_tokens,
        at_once=at_once,
        on_answer=on_answer,
    )
    made: dict[Path, LabelledAnswer] = {}
    labels = _label(
        small, conversations, answers, max_tokens, with_continuations=with_continuations
    )
    for (_, file), labelled in zip(group, labels, strict=True):
        if with_continuations or _read_saved(file, with_continuations=True) is None:
            _write(labelled, file)
        made[file] = labelled
    return made


def _file_key(
    small: SmallModel, large: RecordingLarge, conversation: Sequence[Message], max_tokens: int
) -> str:
    """Return the file name for labels: a hash of all that they depend on."""
    parts = [small.record_name, large.recorded_name, conversation, max_tokens]
    if large.is_approximate:
        # Earlier labels of whole answers have another end token.
        parts.append(small.vocabulary.end_id)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Fork:
    """A disagreement that the small model continues from: prefix, cache and own token.

    `answer_index` is the answer's index among those that are continued in the same batch.
    """

    answer_index: int
    prefix_ids: tuple[int, ...]
    token_id: int
    cache: CacheLayers


def _label(
    small: SmallModel,
    conversations: Sequence[Sequence[Message]],
    answers: Sequence[LargeAnswer],
    max_tokens: int,
    *,
    with_continuations: bool,
) -> Iterator[LabelledAnswer]:
    """Yield the labels of the answers; continue from disagreements once they fill a batch."""
    labelled: list[LabelledAnswer] = []
    forks: list[_Fork] = []
    for conversation, answer in zip(conversations, answers, strict=True):
        prompt_ids = small.encode_conversation(conversation).ids
        scored = small.score_text(prompt_ids, answer.token_ids)
        disagreements = _find_disagreements(answer, scored, small.vocabulary.eos_ids)
        if with_continuations:
            for index in disagreements:
                if index is not None:
                    cache = small.copy_cache(len(prompt_ids) + index)
                    own_id = scored.signals[index].token_id
                    forks.append(_Fork(len(labelled), answer.token_ids[:index], own_id, cache))
        labelled.append(_compare(small, answer, scored, disagreements))
        if len(forks) >= _BATCH_ROWS:
            yield from _add_continuations(small, labelled, forks, max_tokens)
            labelled, forks = [], []
    yield from _add_continuations(small, labelled, forks, max_tokens)


def _add_continuations(
    small: SmallModel,
    answers: Sequence[LabelledAnswer],
    forks: Sequence[_Fork],
    max_tokens: int,
) -> Iterator[LabelledAnswer]:
    """Yield the answers with the texts that continue their forks."""
    texts: list[list[str]] = [[] for _ in answers]
    for fork, text in zip(forks, _continue(small, forks, max_tokens), strict=True):
        texts[fork.answer_index].append(text)
    for answer, continuations in zip(answers, texts, strict=True):
        yield replace(answer, continuations=tuple(continuations))


def _token_ranges(answer: LargeAnswer) -> list[range]:
    """Return the indices of each token of the large model in `token_ids`."""
    return [
        range(*pair) for pair in itertools.pairwise((*answer.token_starts, len(answer.token_ids)))
    ]


def is_disagreement(first_id: int, second_id: int, eos_ids: frozenset[int]) -> bool:
    """Return whether two tokens differ, and are not both end tokens."""
    return first_id != second_id and not eos_ids.issuperset((first_id, second_id))


def _find_disagreements(
    answer: LargeAnswer, scored: ScoredText, eos_ids: frozenset[int]
) -> list[int | None]:
    """Return, for each token of the large model, the first index where the small one differs."""
    differing = {
        index
        for index, token_id in enumerate(answer.token_ids)
        if is_disagreement(scored.signals[index].token_id, token_id, eos_ids)
    }
    return [next((i for i in part if i in differing), None) for part in _token_ranges(answer)]


def _compare(
    small: SmallModel,
    answer: LargeAnswer,
    scored: ScoredText,
    disagreements: Sequence[int | None],
) -> LabelledAnswer:
    """Return the labels of one answer, without continuations."""
    starts = mx.array(list(answer.token_starts))
    small_logprobs = [sum(scored.logprobs[i] for i in part) for part in _token_ranges(answer)]
    hidden, features = scored.hidden[starts].astype(mx.float16), scored.features[starts]
    mx.eval(hidden, features)
    return LabelledAnswer(
        hidden=hidden,
        features=features,
        differs=mx.array([float(index is not None) for index in disagreements]),
        logprobs=mx.array(list(zip(small_logprobs, answer.logprobs, strict=True))),
        text=decode_answer(small, answer.token_ids),
        token_count=len(answer.token_ids),
    )


def _continue(small: SmallModel, forks: Sequence[_Fork], max_tokens: int) -> Iterator[str]:
    """Yield the whole text of the answer that continues each fork."""
    eos_ids = small.vocabulary.eos_ids
    for group in chunks(forks, _BATCH_ROWS):
        limits = [
            0 if fork.token_id in eos_ids else max_tokens - len(fork.prefix_ids) - 1
            for fork in group
        ]
        tails = small.continue_greedily(
            [(fork.cache, fork.token_id) for fork in group], max_tokens=limits
        )
        for fork, tail in zip(group, tails, strict=True):
            yield decode_answer(small, (*fork.prefix_ids, fork.token_id, *tail))


def decode_answer(small: SmallModel, token_ids: Sequence[int]) -> str:
    """Return the text of an answer, without its end token."""
    vocabulary = small.vocabulary
    data = b"".join(
        vocabulary.token_bytes(token_id)
        for token_id in token_ids
        if token_id not in vocabulary.eos_ids
    )
    return data.decode(errors="replace")


def to_list(values: mx.array) -> list[float]:
    """Return the values of an array [n]."""
    return cast("list[float]", values.tolist())


def _write(answer: LabelledAnswer, file: Path) -> None:
    # The names in the file are its format, whatever the fields are called.
    arrays = {
        "hidden": answer.hidden,
        "signals": answer.features,
        "differs": answer.differs,
        "logprobs": answer.logprobs,
    }
    metadata = {"text": answer.text, "tokens": answer.token_count, "alone": answer.continuations}
    write_label_file(file, arrays, metadata)


def write_label_file(
    file: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, Any]
) -> None:
    """Save the labels of an answer, readable by their owner only.

    An interruption leaves no incomplete file of this name.
    """
    write_tensors(file, arrays, {_METADATA_KEY: json.dumps(metadata)}, is_private=True)


def _read_saved(file: Path, *, with_continuations: bool) -> LabelledAnswer | None:
    """Read a file; None if it does not exist, or lacks continuations that are required.

    Raises UsageError if it is damaged.
    """
    if not file.exists():
        return None
    answer = _read(file)
    is_complete = len(answer.continuations) == sum(to_list(answer.differs))
    return answer if is_complete or not with_continuations else None


def _read(file: Path) -> LabelledAnswer:
    def parse(arrays: Mapping[str, mx.array], metadata: Any) -> LabelledAnswer:
        return LabelledAnswer(
            hidden=arrays["hidden"],
            features=arrays["signals"],
            differs=arrays["differs"],
            logprobs=arrays["logprobs"],
            text=str(metadata["text"]),
            token_count=int(metadata["tokens"]),
            continuations=tuple(map(str, metadata["alone"])),
        )

    return read_label_file(file, parse)


def read_label_file(file: Path, parse: Callable[[Mapping[str, mx.array], Any], _T]) -> _T:
    """Return `parse` of a file's arrays and metadata. Raises UsageError if it is damaged."""
    try:
        arrays, metadata = mx.load(str(file), return_metadata=True)
        assert isinstance(arrays, dict)
        assert isinstance(metadata, dict)
        # An array that is not yet computed keeps the file open.
        mx.eval(arrays)
        return parse(arrays, parse_json(metadata[_METADATA_KEY], strict=False))
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, OverflowError) as exc:
        raise UsageError(f"the file of labels {file} is damaged; delete it") from exc
