"""Advantage labels, and heads that are chosen by the accuracy of routed answers."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlxroute.backend.load import load
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.worked_examples import warn_of_trained_questions
from mlxroute.config import Settings
from mlxroute.errors import LargeError, LargeRefused, UsageError
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.recorded.large_answers import LargeAnswer
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.training.advantage.advantage_fitting import AdvantageTraining, make_pairs
from mlxroute.training.advantage.advantage_labels import (
    MAX_DISAGREEMENTS,
    SAMPLES,
    AdvantageLabeller,
    AdvantageLabels,
)
from mlxroute.training.advantage.routed_answers import BudgetedRouter
from mlxroute.training.advantage.shrinkage import RightCounts, shrink_advantages
from mlxroute.training.head_fitting import FittedHead
from mlxroute.training.judged_questions import JudgedQuestion, judge_questions
from mlxroute.training.labels import decode_answer
from mlxroute.types import LargeToken, no_progress
from tests.support.scripted_models import ScriptedLarge
from tests.support.tiny import make_tiny_model

_Z, _SEVEN = 60, 25


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    small = SmallModel(model, tokenizer, name="tiny")
    assert small.vocabulary.token_bytes(_Z) == b"Z"
    assert small.vocabulary.token_bytes(_SEVEN) == b"7"
    return small


# Shrinkage


def test_an_advantage_is_shrunk_by_its_standard_error() -> None:
    certain, likely, none = RightCounts(8, 0, 8), RightCounts(6, 3, 8), RightCounts(4, 4, 8)
    assert (certain.difference, likely.difference, none.difference) == (1.0, 0.375, 0.0)
    # Shares of (right + 1) / 10: 0.9 and 0.1; 0.7 and 0.4; 0.5 twice.
    assert certain.variance == pytest.approx((0.09 + 0.09) / 10)
    assert likely.variance == pytest.approx((0.21 + 0.24) / 10)
    assert none.variance == pytest.approx((0.25 + 0.25) / 10)
    assert certain.unbiased_variance == 0
    assert likely.unbiased_variance == pytest.approx((0.75 * 0.25 + 0.375 * 0.625) / 7)
    assert none.unbiased_variance == pytest.approx((0.25 + 0.25) / 7)
    true_variance = (1 + 0.375**2 - (0.75 * 0.25 + 0.375 * 0.625) / 7 - 0.5 / 7) / 3
    assert shrink_advantages([certain, likely, none]) == pytest.approx(
        [
            true_variance / (true_variance + 0.018),
            0.375 * true_variance / (true_variance + 0.045),
            0.0,
        ]
    )
    assert shrink_advantages([]) == []
    # Differences that are no larger than chance makes them.
    assert shrink_advantages([likely, none, none, none]) == [0.0] * 4


def test_few_clear_advantages_among_many_positions_without_one_are_evidence() -> None:
    clear, equal = RightCounts(8, 0, 8), RightCounts(0, 0, 8)
    shrunk = shrink_advantages([clear] * 17 + [equal] * 983)
    assert shrunk == pytest.approx([0.017 / (0.017 + 0.018)] * 17 + [0.0] * 983)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_differences_by_chance_are_shrunk_to_nearly_0(share: float, seed: int) -> None:
    draw = random.Random(seed)

    def right() -> int:
        return sum(draw.random() < share for _ in range(8))

    counts = [RightCounts(right(), right(), 8) for _ in range(5000)]
    largest = max(counts, key=lambda item: item.difference)
    assert largest.difference >= 0.375
    kept = shrink_advantages(counts)[counts.index(largest)] / largest.difference
    # The estimate of the variance of the true advantages is 0 in the mean; its error is about
    # 1.5 times the variance of a difference, over the root of the number of positions.
    assert kept < 0.15


_COUNTS = st.builds(RightCounts, st.integers(0, 8), st.integers(0, 8), st.just(8))


@given(st.lists(_COUNTS, min_size=1, max_size=20))
def test_shrinking_keeps_the_sign_and_favours_none(counts: list[RightCounts]) -> None:
    for item, value in zip(counts, shrink_advantages(counts), strict=True):
        assert abs(value) <= abs(item.difference)
        assert value * item.difference >= 0


# Labels


@dataclass(frozen=True)
class ScriptedJudge(JudgedQuestion):
    """Texts with a Z are right."""

    def is_right(self, text: str) -> bool:
        return "Z" in text


def judged(count: int, *, answer: str = "7") -> list[JudgedQuestion]:
    questions = [Question(str(i), f"say {i}", AnswerKind.NUMBER, answer) for i in range(count)]
    return [JudgedQuestion(question, question_messages(question)) for question in questions]


def labelled(
    small: SmallModel,
    large: ScriptedLarge,
    folder: Path,
    questions: list[JudgedQuestion],
    *,
    tokens: int = 6,
) -> list[AdvantageLabels]:
    router = BudgetedRouter("entropy", 0.3, (0.0, 3.0))
    folder.mkdir(exist_ok=True)
    with RecordingLarge(large, folder / "replies.jsonl", at_once=2) as recording:
        labeller = AdvantageLabeller(small, recording, router, tokens, folder / "labels", at_once=2)
        return labeller.label(questions, progress=no_progress)


def same_labels(first: list[AdvantageLabels], second: list[AdvantageLabels]) -> bool:
    return [item.text for item in first] == [item.text for item in second] and all(
        mx.array_equal(getattr(a, name), getattr(b, name), equal_nan=True).item()
        for a, b in zip(first, second, strict=True)
        for name in ("hidden", "features", "differs", "right")
    )


def test_the_label_is_the_difference_of_the_shares_of_right_outcomes(
    small: SmallModel, tmp_path: Path
) -> None:
    # An answer of one token, which is right if it is the large model's.
    answers = labelled(small, ScriptedLarge([(_SEVEN,)]), tmp_path, judged(3), tokens=1)
    for answer in answers:
        assert answer.counts() == {0: RightCounts(SAMPLES, 0, SAMPLES)}
    # The other way round, both choices are wrong.
    answers = labelled(
        small, ScriptedLarge([(_SEVEN,)]), tmp_path, judged(3, answer="99"), tokens=1
    )
    assert [answer.counts() for answer in answers] == [{0: RightCounts(0, 0, SAMPLES)}] * 3


def drawn_alone(small: SmallModel, ids: list[int], limit: int, seed: str) -> list[int]:
    """A continuation of prompt and answer, drawn with single rows."""
    alone = small.with_own_cache()
    signals, _ = alone.prefill(ids)
    draws = random.Random(seed)
    written: list[int] = []
    while len(written) < limit:
        weights = [math.exp(logprob) for logprob in signals.top_logprobs]
        token_id = draws.choices(signals.top_ids, weights)[0]
        if token_id in small.vocabulary.eos_ids:
            break
        written.append(token_id)
        signals = alone.step(token_id)
    return written


def test_both_choices_are_continued_from_each_disagreement(
    small: SmallModel, tmp_path: Path
) -> None:
    question = judged(1)[0].question
    item = ScriptedJudge(question, question_messages(question))
    (answer,) = labelled(small, ScriptedLarge([(_Z,)]), tmp_path, [item], tokens=4)
    prompt = list(small.encode_conversation(item.conversation).ids)
    written = list(small.vocabulary.encode(answer.text))[:4]
    differs = [bool(value) for value in cast("list[float]", answer.differs.tolist())]
    assert len(differs) == len(written) == 4
    assert set(answer.counts()) == {i for i, value in enumerate(differs) if value}
    for position, counts in answer.counts().items():
        signals, _ = small.with_own_cache().prefill([*prompt, *written[:position]])
        assert signals.token_id != _Z
        for token_id, right in ((_Z, counts.large), (signals.token_id, counts.small)):
            beginning = [*written[:position], token_id]
            seed = f"{question.fingerprint} {position} {token_id}"
            texts = [
                decode_answer(small, [*beginning, *ids])
                for ids in (
                    drawn_alone(small, prompt + beginning, 4 - len(beginning), f"{seed} {number}")
                    for number in range(SAMPLES)
                )
            ]
            assert right == sum(map(item.is_right, texts))
        assert counts.large == SAMPLES


def test_rows_without_an_answer_are_judged_by_the_large_models_outcome(
    small: SmallModel, tmp_path: Path
) -> None:
    questions = [
        Question("a", "say a", AnswerKind.NUMBER, None),
        Question("b", "say b", AnswerKind.NUMBER, "8"),
    ]
    end = LargeToken((small.vocabulary.end_id,), "", True, -0.5, (), None, None, None, 100, 0.1)
    large = ScriptedLarge([(_SEVEN,), (_SEVEN,), end])
    with RecordingLarge(large, tmp_path / "r.jsonl") as recording:
        items = judge_questions(small, recording, questions, examples=[], max_tokens=3, at_once=1)
    assert [item.reference for item in items] == ["77", "8"]
    assert [item.is_right("It is 77") for item in items] == [True, False]
    assert [item.is_right("8") for item in items] == [False, True]


def test_questions_to_which_the_large_model_gives_no_answer_are_left_out(
    small: SmallModel, tmp_path: Path
) -> None:
    questions = [
        Question(str(i), f"say {i}", AnswerKind.NUMBER, "8" if i == 3 else None) for i in range(10)
    ]
    large = ScriptedLarge([(_Z,)])
    with RecordingLarge(large, tmp_path / "r.jsonl") as recording:
        items = judge_questions(small, recording, questions, examples=[], max_tokens=2, at_once=1)
    assert [item.question.name for item in items] == ["3"]
    with pytest.raises(UsageError, match="10 answers that can be judged, not 1"):
        trained(small, tmp_path, 10, answers=("8", *[None] * 9), large=large)


def test_a_number_at_which_the_large_models_answer_was_cut_off_is_not_right(
    small: SmallModel, tmp_path: Path
) -> None:
    questions = [
        Question("a", "say a", AnswerKind.NUMBER, None),
        Question("b", "say b", AnswerKind.NUMBER, "8"),
    ]
    answers: list[LargeAnswer] = []
    with RecordingLarge(ScriptedLarge([(_SEVEN,)]), tmp_path / "r.jsonl") as recording:
        items = judge_questions(
            small,
            recording,
            questions,
            examples=[],
            max_tokens=2,
            at_once=1,
            on_answers=answers.extend,
        )
    assert [item.reference for item in items] == ["8"]
    assert [answer.token_ids for answer in answers] == [(_SEVEN, _SEVEN)]


def test_labels_of_a_model_whose_files_changed_are_made_again(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fingerprint, count in (("", 1), ("1a", 2), ("1a", 2)):
        monkeypatch.setattr(small, "fingerprint", fingerprint)
        labelled(small, ScriptedLarge([(_SEVEN,)]), tmp_path, judged(1), tokens=1)
        assert len(list((tmp_path / "labels").iterdir())) == count


def test_an_interrupted_run_continues_with_the_same_labels(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxroute.training.advantage.advantage_labels._GROUP", 2)
    questions = judged(6)
    whole = labelled(small, ScriptedLarge([(_Z,)]), tmp_path / "whole", questions, tokens=4)
    calls = 0
    folder = tmp_path / "parts"
    for limit in (14, 6):
        large = ScriptedLarge([*[(_Z,)] * limit, LargeRefused("no")])
        with pytest.raises(LargeError):
            labelled(small, large, folder, questions, tokens=4)
        calls += limit
    saved = {file.name: file.read_bytes() for file in (folder / "labels").iterdir()}
    assert 0 < len(saved) < 6
    large = ScriptedLarge([(_Z,)])
    assert same_labels(labelled(small, large, folder, questions, tokens=4), whole)
    # No context was sent twice, and no label was made again.
    rows = (folder / "replies.jsonl").read_text().splitlines()
    assert len(rows) == len((tmp_path / "whole" / "replies.jsonl").read_text().splitlines())
    assert calls + len(large.contexts) <= len(rows) + 4
    for name, data in saved.items():
        assert (folder / "labels" / name).read_bytes() == data
    again = ScriptedLarge([LargeRefused("called again")])
    assert same_labels(labelled(small, again, folder, questions, tokens=4), whole)
    # Another right answer or another router needs other labels.
    with pytest.raises(LargeError):
        labelled(small, again, tmp_path / "new", judged(6, answer="8"), tokens=4)


def test_a_damaged_file_of_advantage_labels_is_named(small: SmallModel, tmp_path: Path) -> None:
    questions = judged(1)
    labelled(small, ScriptedLarge([(_Z,)]), tmp_path, questions)
    (file,) = (tmp_path / "labels").iterdir()
    for data in (b"", b"no safetensors", file.read_bytes()[:200]):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=rf"labels {file} is damaged; delete it"):
            labelled(small, ScriptedLarge([(_Z,)]), tmp_path, questions)


# Targets and heads

_HIDDEN = 64


def synthetic(count: int, *, seed: int = 0, differing: int = 4) -> list[AdvantageLabels]:
    """Answers of 40 positions in which one dimension of the state decides the advantage."""
    answers = []
    for key in mx.random.split(mx.random.key(seed), count):
        hidden = mx.random.normal((40, _HIDDEN), key=key)
        features = mx.abs(mx.random.normal((40, 4), key=mx.random.split(key)[0]))
        differs = (mx.arange(40) < differing).astype(mx.float32)
        helps = hidden[:, 3] > 0
        right = mx.stack([mx.where(helps, 8.0, 1.0), mx.full((40,), 1.0)], axis=1)
        right = mx.where(
            (mx.arange(40) < min(differing, MAX_DISAGREEMENTS))[:, None], right, math.nan
        )
        answers.append(AdvantageLabels(hidden.astype(mx.float16), features, differs, right, ""))
    return answers


def test_targets_are_0_where_the_models_agree_and_have_unit_deviation() -> None:
    labels = synthetic(20)
    pairs = make_pairs(labels)
    values = [value for _, targets in pairs for value in targets]
    assert len(values) == 20 * 40
    mean = sum(values) / len(values)
    assert sum((value - mean) ** 2 for value in values) / len(values) == pytest.approx(1, rel=1e-4)
    for answer, (_, targets) in zip(labels, pairs, strict=True):
        counts = answer.counts()
        assert all(targets[i] == 0 for i in range(40) if i not in counts)
        helpful = [i for i, item in counts.items() if item.difference > 0]
        assert len({targets[i] for i in helpful}) <= 1
        assert all(targets[i] > 0 for i in helpful)


def test_an_answer_with_more_disagreements_is_thinned() -> None:
    (first, *_) = labels = synthetic(12, differing=2 * MAX_DISAGREEMENTS)
    assert len(first.counts()) == MAX_DISAGREEMENTS
    agreed = 40 - 2 * MAX_DISAGREEMENTS
    for labelled_answer, targets in make_pairs(labels):
        # Half of the disagreements are known, so half of the other positions are used.
        assert labelled_answer.hidden.shape == (MAX_DISAGREEMENTS + agreed // 2, _HIDDEN)
        assert labelled_answer.differs.sum().item() == MAX_DISAGREEMENTS
        assert len(targets) == MAX_DISAGREEMENTS + agreed // 2
    assert make_pairs(labels)[3][1] == make_pairs(labels)[3][1]


def test_labels_without_a_difference_are_an_error() -> None:
    same = [
        replace(item, right=mx.where(mx.isnan(item.right), item.right, 3.0))
        for item in synthetic(12)
    ]
    with pytest.raises(UsageError, match="help no more than chance"):
        make_pairs(same)


def trained(
    small: SmallModel,
    folder: Path,
    count: int,
    *,
    tokens: int = 6,
    answers: tuple[str | None, ...] = ("7",),
    large: ScriptedLarge | None = None,
) -> FittedHead:
    """Train with questions that have these answers in turns."""
    questions = [
        Question(str(i), f"say {i}", AnswerKind.NUMBER, answers[i % len(answers)])
        for i in range(count)
    ]
    ranks = ScoreRanks.find("tiny", folder)
    with RecordingLarge(
        large or ScriptedLarge([(_SEVEN,)]), folder / "r.jsonl", at_once=2
    ) as recording:
        training = AdvantageTraining(
            small,
            recording,
            ranks,
            BudgetedRouter.entropy(ranks, 0.3),
            max_tokens=tokens,
            folder=folder / "labels",
            at_once=2,
            progress=no_progress,
        )
        return training.run(questions, examples=[], provenance={"small": "tiny"})


@pytest.mark.usefixtures("few_steps")
def test_the_head_with_the_most_right_answers_is_chosen(small: SmallModel, tmp_path: Path) -> None:
    fitted = trained(small, tmp_path, 11, tokens=4)
    report, routed = fitted.report, fitted.report["routed"]
    assert list(report) == [
        *("small", "labels", "written_by", "shape", "answers", "unjudged", "positions"),
        *("differing", "continued", "mean_advantage", "routed"),
    ]
    assert report["labels"] == "advantage"
    assert report["written_by"] == {"router": "entropy", "budget": 0.3}
    assert report["answers"] == {"fitted": 8, "held_out": 3}
    assert (len(routed["candidates"]), routed["judged_by"]) == (3, "answers")
    accuracies = {name: row["accuracy"] for name, row in routed["candidates"].items()}
    assert routed["head"] == routed["candidates"][report["shape"]]
    best = [
        row for row in routed["candidates"].values() if row["accuracy"] == max(accuracies.values())
    ]
    cheapest = min(row["large_tokens_per_question"] for row in best)
    assert routed["head"]["accuracy"] == max(accuracies.values())
    assert routed["head"]["large_tokens_per_question"] == cheapest
    assert fitted.beats_entropy == (routed["head"]["accuracy"] > routed["entropy"]["accuracy"])
    assert fitted.beats_entropy == (routed["only_head"] > routed["only_entropy"])
    assert len(fitted.questions) == 11
    # The same labels give the same head, and the file has today's format.
    again = trained(small, tmp_path, 11, tokens=4)
    assert again.report == report
    fitted.write(tmp_path / "h.safetensors")
    assert small.load_head(tmp_path / "h.safetensors") == fitted.quantiles
    small.set_head(None)


def test_too_few_questions_are_an_error(small: SmallModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 10 answers, not 9"):
        trained(small, tmp_path, 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--head", "missing.safetensors"], "there is no file missing.safetensors"),
        (["--budget", "200%"], "from 0% to 100%"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Why {i}?"}) + "\n" for i in range(10)))
    train = ["train", "--data", str(data), "--labels", "advantage", "--large"]
    assert main([*train, "http://127.0.0.1:9/v1", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_questions_that_the_adapter_was_trained_with_are_named(tmp_path: Path) -> None:
    questions = [Question(str(i), f"say {i}") for i in range(4)]
    trained = [question.fingerprint for question in questions[1:]]
    (tmp_path / "provenance.json").write_text(json.dumps({"questions": trained}))
    for adapter, message in (
        (str(tmp_path), "trained with 3 of these 4 questions"),
        (None, ""),
    ):
        err = Console(file=io.StringIO(), width=300)
        warn_of_trained_questions(Settings(adapter=adapter), questions, err)
        text = cast("io.StringIO", err.file).getvalue()
        assert message in text
        assert bool(text) == bool(message)
