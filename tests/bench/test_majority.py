"""The majority of sampled answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlxroute.backend.load import load
from mlxroute.bench.quality import majority
from mlxroute.bench.quality.graded_answers import QualityResults
from mlxroute.bench.quality.majority import MajorityBench
from mlxroute.bench.quality.question_runs import bench_quality
from mlxroute.bench.quality.sides import make_sides
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.quality_tables import print_quality
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.small.sampled_continuations import sample_continuations
from mlxroute.types import no_progress
from tests.support.scripted_models import ScriptedLarge
from tests.support.tiny import KINDS, make_tiny_model

_RANKS = ScoreRanks("tiny", "none", 0, {"entropy": (0.0, 6.0)})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


def number(answer: str, name: str = "1") -> Question:
    return Question(name, f"say {name}", AnswerKind.NUMBER, answer)


@pytest.mark.parametrize(
    ("texts", "chosen", "lenient"),
    [
        (("3", "so it is 4", "4"), "so it is 4", True),
        # Texts without an answer do not vote; of equal counts, the first answer counts.
        (("none", "none", "3", "4"), "3", False),
        (("none", "no"), "none", None),
    ],
)
def test_the_most_frequent_answer_counts(
    texts: tuple[str, ...],
    chosen: str,
    lenient: bool | None,
    small: SmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = [small.vocabulary.encode(text) for text in texts]
    monkeypatch.setattr(majority, "sample_continuations", lambda *args, **options: [written])
    bench = MajorityBench(small, [], len(texts), 8, 0.5, QualityResults(tmp_path / "r"))
    (row,) = bench.answer_all([number("4")], no_progress)
    assert (row.text, row.lenient) == (chosen, lenient)
    assert row.tokens == sum(map(len, written))
    assert row.seconds == pytest.approx(0.5 * row.tokens)
    assert (row.calls, row.escalated, row.scores) == (0, 0, ())


@pytest.mark.parametrize(("room", "is_cut_off"), [(3, True), (4, False)])
def test_an_answer_that_fills_the_context_is_cut_off(
    room: int,
    is_cut_off: bool,
    small: SmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    question = number("4")
    length = len(small.encode_conversation(question_messages(question, [])).ids)
    path = make_tiny_model(tmp_path / "short", context=length + room)
    written = [list(small.vocabulary.encode("4")) * 3]
    monkeypatch.setattr(majority, "sample_continuations", lambda *args, **options: [written])
    short = SmallModel(*load(path), name="short")
    bench = MajorityBench(short, [], 1, 8, 0.5, QualityResults(tmp_path / "r"))
    (row,) = bench.answer_all([question], no_progress)
    assert row.tokens == 3
    assert row.is_cut_off == is_cut_off


def test_a_majority_is_a_side_without_calls_and_a_baseline_of_every_budget(
    small: SmallModel, tmp_path: Path
) -> None:
    questions = [number("4", str(i)) for i in range(3)]

    def run(step_s: float) -> tuple[dict[str, Any], ScriptedLarge]:
        large = ScriptedLarge([(70,)])
        with RecordingLarge(large, tmp_path / "replies") as recorded:
            report = bench_quality(
                small,
                recorded,
                questions,
                sides=make_sides(["entropy"], [0.1, 0.3], majority=3),
                examples=[],
                ranks=_RANKS,
                max_tokens=12,
                step_s=step_s,
                results=QualityResults(tmp_path / "r"),
            )
        return report, large

    report, _ = run(0.01)
    side = report["sides"]["majority of 3"]
    assert (side["router"], side["calls"], side["large_tokens_per_question"]) == (None, 0, 0)
    assert 0 < side["tokens"] <= 3 * 3 * 12
    assert [(pair["first"], pair["second"]) for pair in report["comparisons"]] == [
        ("entropy 10%", "majority of 3"),
        ("entropy 30%", "majority of 3"),
    ]
    table = io.StringIO()
    print_quality(report, Console(file=table, width=200))
    # Lenient marks and the share of the gap come before large tokens, calls and sent tokens.
    line = next(line for line in table.getvalue().splitlines() if "majority of 3" in line)
    assert line.split()[-4:-1] == ["0.00", "0.00", "0"]
    again, large = run(0.02)
    assert large.contexts == []
    # Saved majorities are timed anew, like other answers.
    repeated = again["sides"]["majority of 3"]
    assert repeated["seconds_median"] == pytest.approx(2 * side["seconds_median"], abs=2e-3)
    assert repeated["lenient"] == side["lenient"]


def test_samples_of_one_question_differ_and_do_not_depend_on_the_other_questions(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[list[int]]] = []

    def keep(*args: Any, **options: Any) -> list[list[list[int]]]:
        groups = sample_continuations(*args, **options)
        written.extend(groups)
        return groups

    monkeypatch.setattr(majority, "sample_continuations", keep)
    bench = MajorityBench(small, [], 4, 8, 0.5, QualityResults(tmp_path / "a"))
    bench.answer_all([number("4", "1"), number("4", "2")], no_progress)
    alone = MajorityBench(small, [], 4, 8, 0.5, QualityResults(tmp_path / "b"))
    alone.answer_all([number("4", "2")], no_progress)
    assert len(set(map(tuple, written[0]))) > 1
    assert written[1] == written[2]


def test_a_model_whose_caches_cannot_be_rows_is_refused_before_any_call(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "g", model_type="gemma3_text", extra=KINDS["gemma3_text"])
    model, tokenizer = load(path)
    large = ScriptedLarge([(70,)])
    with (
        RecordingLarge(large, tmp_path / "replies") as recorded,
        pytest.raises(UsageError, match="needs plain KV caches") as caught,
    ):
        bench_quality(
            SmallModel(model, tokenizer, name="g"),
            recorded,
            [number("4")],
            sides=make_sides(["entropy"], [0.1], majority=2),
            examples=[],
            ranks=_RANKS,
            max_tokens=4,
            step_s=0.01,
            results=QualityResults(tmp_path / "r"),
        )
    assert caught.value.parameter == "majority"
    assert large.contexts == []
