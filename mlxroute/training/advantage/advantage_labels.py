"""Labels of routed answers: how much the large model's token helps where the models disagree.

The answer is written with a router, as a user would have it written. The large model then says what
it would write at each of its positions. Where that differs from the small model's own choice, the
small model alone continues both choices, several times each, and the outcomes are counted. What is
known of each question is saved in a file of its own, so that no work is repeated.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx

from mlxroute.questions.grading import is_outcome_known
from mlxroute.recorded.large_choices import WrittenAnswer, find_large_choices
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.sequences import chunks
from mlxroute.small import SmallModel
from mlxroute.small.kv_cache import CacheLayers
from mlxroute.small.sampled_continuations import SampleStart, sample_continuations
from mlxroute.training.advantage.routed_answers import (
    BudgetedRouter,
    RoutedAnswer,
    write_routed_answers,
)
from mlxroute.training.advantage.shrinkage import RightCounts
from mlxroute.training.judged_questions import JudgedQuestion
from mlxroute.training.labels import (
    decode_answer,
    is_disagreement,
    read_label_file,
    write_label_file,
)
from mlxroute.types import Progress

SAMPLES: Final = 8
"""Number of continuations of each choice."""
MAX_DISAGREEMENTS: Final = 8
"""Maximum number of disagreements of an answer whose choices are continued."""
# Questions that are answered and labelled at a time.
_GROUP: Final = 16
# Part of the names of label files, to be raised if the same settings give other labels.
_VERSION: Final = "advantage 1"
_LABEL: Final = "labelled answers"


@dataclass(frozen=True, slots=True)
class AdvantageLabels:
    """The n positions of one routed answer.

    Args:
        hidden: Final hidden states in float16, [n, D].
        features: The other inputs of a head (see `small.mlp_head.signal_features`), [n, 4].
        differs: 1 where the models disagree, else 0, [n].
        right: Numbers of right continuations of the large and of the small model's choice, NaN
            where they were not written, [n, 2].
        text: The answer.
    """

    hidden: mx.array
    features: mx.array
    differs: mx.array
    right: mx.array
    text: str

    def counts(self) -> dict[int, RightCounts]:
        """Return the counts of right continuations, by position."""
        rows = cast("list[list[float]]", self.right.tolist())
        return {
            position: RightCounts(int(large), int(small), SAMPLES)
            for position, (large, small) in enumerate(rows)
            if not math.isnan(large)
        }


@dataclass(frozen=True, slots=True)
class _Branch:
    """A disagreement that is continued.

    Args:
        item: The question.
        layers: KV cache of the prompt and the answer.
        prompt_length: Number of tokens of the prompt.
        answer_ids: The answer before the disagreement.
        token_ids: The large and the small model's choice.
    """

    item: JudgedQuestion
    layers: CacheLayers
    prompt_length: int
    answer_ids: tuple[int, ...]
    token_ids: tuple[int, int]

    @property
    def position(self) -> int:
        """The number of the position in the answer."""
        return len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class AdvantageLabeller:
    """Makes labels, or reads those that were made before.

    Args:
        small: The small model.
        large: The large model and its recorded tokens.
        router: The router that writes the answers.
        max_tokens: Maximum length of an answer.
        folder: Folder of the files.
        at_once: Maximum number of calls in flight.
    """

    small: SmallModel
    large: RecordingLarge
    router: BudgetedRouter
    max_tokens: int
    folder: Path
    at_once: int

    def label(
        self, questions: Sequence[JudgedQuestion], *, progress: Progress
    ) -> list[AdvantageLabels]:
        """Return the labels of the answers to the questions.

        Raises LargeError when the large model fails; labels made until then stay saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [self._file(item) for item in questions]
        done = sum(file.exists() for file in files)
        progress(_LABEL, done, len(questions))
        # The same groups in every run, because a batch rounds by what is in it.
        for group in chunks(list(zip(questions, files, strict=True)), _GROUP):
            missing = [(item, file) for item, file in group if not file.exists()]
            if not missing:
                continue
            labels = self._label_group([item for item, _ in missing])
            for (_, file), answer in zip(missing, labels, strict=True):
                _write(answer, file)
            done += len(missing)
            progress(_LABEL, done, len(questions))
        return [read_label_file(file, _parse) for file in files]

    def _file(self, item: JudgedQuestion) -> Path:
        """Return the file of a question, named by a hash of all that its labels depend on."""
        router = [self.router.name, self.router.budget, self.router.quantiles, self.router.head]
        models = [self.small.record_name, self.large.recorded_name]
        sizes = [self.max_tokens, SAMPLES, MAX_DISAGREEMENTS]
        key = json.dumps([_VERSION, models, item.conversation, item.reference, router, sizes])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _label_group(self, questions: Sequence[JudgedQuestion]) -> list[AdvantageLabels]:
        """Write answers to questions, all at once, and return their labels."""
        conversations = [item.conversation for item in questions]
        answers = write_routed_answers(
            self.small,
            self.large,
            conversations,
            # A router of its own for each answer, so that no question depends on others.
            [self.router.start() for _ in questions],
            max_tokens=self.max_tokens,
        )
        choices = find_large_choices(
            self.small,
            self.large,
            [
                WrittenAnswer(conversation, answer.token_ids, answer.is_whole)
                for conversation, answer in zip(conversations, answers, strict=True)
            ],
            at_once=self.at_once,
            on_answer=lambda: None,
        )
        compared = [
            self._compare(item, answer, large_ids)
            for item, answer, large_ids in zip(questions, answers, choices, strict=True)
        ]
        branches = [branch for _, group in compared for branch in group]
        right = iter(self._count_right(branches))
        return [
            _add_counts(labels, {branch.position: next(right) for branch in group})
            for labels, group in compared
        ]

    def _compare(
        self, item: JudgedQuestion, answer: RoutedAnswer, large_ids: Sequence[int]
    ) -> tuple[AdvantageLabels, list[_Branch]]:
        """Return the labels of an answer without counts, and the disagreements to continue.

        The labels go up to where the server could continue the answer.
        """
        eos_ids = self.small.vocabulary.eos_ids
        prompt_ids = self.small.encode_conversation(item.conversation).ids
        answer_ids = [*answer.token_ids, self.small.vocabulary.end_id][: len(large_ids)]
        if not answer_ids:
            nothing = mx.zeros((0, 1))
            return AdvantageLabels(nothing, nothing, nothing[:, 0], nothing, answer.text), []
        scored = self.small.score_text(prompt_ids, answer_ids)
        small_ids = [signals.token_id for signals in scored.signals]
        differing = [
            position
            for position, pair in enumerate(zip(small_ids, large_ids, strict=True))
            if is_disagreement(*pair, eos_ids)
        ]
        hidden = scored.hidden.astype(mx.float16)
        mx.eval(hidden)
        labels = AdvantageLabels(
            hidden=hidden,
            features=scored.features,
            differs=mx.array([float(i in differing) for i in range(len(answer_ids))]),
            right=mx.full((len(answer_ids), 2), math.nan),
            text=answer.text,
        )
        chosen = _choose(differing, item.question.fingerprint)
        if not chosen:
            return labels, []
        layers = self.small.copy_cache(len(prompt_ids) + chosen[-1])
        return labels, [
            _Branch(
                item,
                layers,
                len(prompt_ids),
                tuple(answer_ids[:position]),
                (large_ids[position], small_ids[position]),
            )
            for position in chosen
        ]

    def _count_right(self, branches: Sequence[_Branch]) -> list[tuple[int, int]]:
        """Return how many continuations of each branch's two tokens are right."""
        beginnings = [
            (branch, (*branch.answer_ids, token_id))
            for branch in branches
            for token_id in branch.token_ids
        ]
        starts = [
            SampleStart(
                layers=branch.layers,
                length=branch.prompt_length + branch.position,
                token_id=ids[-1],
                limit=self.max_tokens - len(ids),
                seed=f"{branch.item.question.fingerprint} {branch.position} {ids[-1]}",
                is_over=functools.partial(self._is_over, branch.item, ids),
            )
            for branch, ids in beginnings
        ]
        samples = sample_continuations(
            self.small.decoder, starts, count=SAMPLES, eos_ids=self.small.vocabulary.eos_ids
        )
        texts = [
            [decode_answer(self.small, (*ids, *rest)) for rest in group]
            for (_, ids), group in zip(beginnings, samples, strict=True)
        ]
        counts = [
            # Programs take long to judge, and many continuations are equal.
            sum(count * branch.item.is_right(text) for text, count in Counter(group).items())
            for (branch, _), group in zip(beginnings, texts, strict=True)
        ]
        return list(zip(counts[::2], counts[1::2], strict=True))

    def _is_over(self, item: JudgedQuestion, beginning: Sequence[int], ids: Sequence[int]) -> bool:
        return is_outcome_known(item.question, decode_answer(self.small, (*beginning, *ids)))


def _add_counts(labels: AdvantageLabels, counts: Mapping[int, tuple[int, int]]) -> AdvantageLabels:
    """Return the labels with the counts of some positions."""
    unknown = (math.nan, math.nan)
    if not counts:
        return labels
    rows = [counts.get(position, unknown) for position in range(labels.differs.size)]
    return replace(labels, right=mx.array(rows))


def _choose(positions: Sequence[int], seed: str) -> list[int]:
    """Return the positions, or as many of them as are continued, drawn at random."""
    if len(positions) <= MAX_DISAGREEMENTS:
        return list(positions)
    return sorted(random.Random(seed).sample(positions, MAX_DISAGREEMENTS))


def _write(labels: AdvantageLabels, file: Path) -> None:
    # The names in the file are its format, whatever the fields are called.
    arrays = {
        "hidden": labels.hidden,
        "signals": labels.features,
        "differs": labels.differs,
        "right": labels.right,
    }
    write_label_file(file, arrays, {"text": labels.text})


def _parse(arrays: Mapping[str, mx.array], metadata: Any) -> AdvantageLabels:
    return AdvantageLabels(
        hidden=arrays["hidden"],
        features=arrays["signals"],
        differs=arrays["differs"],
        right=arrays["right"],
        text=str(metadata["text"]),
    )
