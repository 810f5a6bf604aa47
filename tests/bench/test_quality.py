"""`bench quality`: every side on every question, no call repeated, budgets kept."""

from __future__ import annotations

import copy
import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from rich.console import Console

from mlxroute.backend.load import load
from mlxroute.bench.plot import draw_quality
from mlxroute.bench.quality.graded_answers import QualityResults
from mlxroute.bench.quality.oracles import compute_oracles
from mlxroute.bench.quality.question_runs import bench_quality, measure_step_s
from mlxroute.bench.quality.sides import LARGE, ORACLES, SMALL, make_sides
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.quality_tables import print_quality
from mlxroute.engine import generate
from mlxroute.errors import (
    LargeError,
    LargeNotContinued,
    LargeProtocolError,
    LargeRefused,
    LargeUnreachable,
)
from mlxroute.questions.question_files import (
    AnswerKind,
    FunctionTask,
    Question,
    question_messages,
)
from mlxroute.recorded.answer_scores import AnswerScores
from mlxroute.recorded.recording_large import RecordingLarge, RecordingStopped
from mlxroute.routers import BURST, make_router
from mlxroute.serving.concurrent_answers import ConcurrentAnswers, SharedSmallClient
from mlxroute.small import SmallModel
from mlxroute.training.labels import LabelledAnswer
from mlxroute.types import LargeContext, LargeToken, Message, Sampling
from tests.support.scripted_models import (
    FakeCall,
    FakeClock,
    ScriptedLarge,
    ScriptedReply,
    ScriptedWholeAnswer,
)
from tests.support.tiny import make_tiny_model

_TOKENS = 12
_RANKS = ScoreRanks("tiny", "none", 0, {"entropy": (0.0, 6.0)})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


@pytest.fixture(scope="module")
def questions(small: SmallModel) -> list[Question]:
    """Questions of which the small model answers the first half right."""
    questions = []
    for i in range(8):
        prompt = f"say {i}"
        answer = generate(
            small,
            None,
            prompt,
            router=make_router("entropy", threshold=math.inf),
            max_tokens=_TOKENS,
        )
        text = "".join(token.text for token in answer)
        questions.append(Question(str(i), prompt, AnswerKind.TEXT, text if i < 4 else "never said"))
    return questions


def run(
    small: SmallModel,
    questions: list[Question],
    path: Path,
    *,
    replies: tuple[ScriptedReply, ...] = ((70,),),
    routers: tuple[str, ...] = ("entropy",),
    compare: tuple[tuple[str, str], ...] = (),
    large: ScriptedLarge | None = None,
    chats: int = 1,
    step_s: float = 0.01,
) -> tuple[dict[str, Any], ScriptedLarge]:
    large = large or ScriptedLarge(replies)
    with RecordingLarge(large, path.with_suffix(".replies")) as recorded:
        report = bench_quality(
            small,
            recorded,
            questions,
            sides=make_sides(routers, [0.1]),
            examples=[],
            ranks=_RANKS,
            max_tokens=_TOKENS,
            step_s=step_s,
            results=QualityResults(path),
            compare=compare,
            chats=chats,
            scores=AnswerScores(path.with_suffix(".scores")),
        )
    return report, large


@pytest.fixture(scope="module")
def unanswered(questions: list[Question]) -> list[Question]:
    """Some of the questions, without a right answer."""
    return [replace(question, answer=None) for question in questions[:4]]


@dataclass(frozen=True)
class WholeRun:
    """A run of all questions that was not interrupted; a test may use a copy of its files."""

    report: dict[str, Any]
    large: ScriptedLarge
    path: Path

    def copy_files(self, folder: Path) -> Path:
        shutil.copytree(self.path.parent, folder, dirs_exist_ok=True)
        return folder / self.path.name


@pytest.fixture(scope="module")
def whole(
    small: SmallModel, questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> WholeRun:
    path = tmp_path_factory.mktemp("whole") / "r.jsonl"
    return WholeRun(*run(small, questions, path), path)


def test_sides_are_graded_and_compared(whole: WholeRun) -> None:
    report, large = whole.report, whole.large
    sides = report["sides"]
    assert list(sides) == [SMALL.name, LARGE.name, "entropy 10%"]
    alone = sides["small"]
    assert (alone["strict"]["accuracy"], alone["calls"], alone["escalation_rate"]) == (0.5, 0, 0)
    assert sides["large"]["strict"]["accuracy"] == 0
    assert sides["large"]["escalation_rate"] == 1
    assert sides["large"]["strict"]["p_against_small"] == 0.125
    assert sides["large"]["strict"]["over_small"] == 0
    # A call of one side is not repeated by the others.
    calls = [tuple(context.token_ids) for context in large.contexts]
    assert len(calls) == len(set(calls))
    assert len(calls) <= sides["large"]["calls"] + sides["entropy 10%"]["calls"]
    # The budget carries over from question to question.
    routed = sides["entropy 10%"]
    assert 0 < routed["calls"] <= 0.1 * routed["tokens"] + BURST
    assert 0 < routed["most_over_budget"] <= BURST


@pytest.mark.parametrize("only_chats", [True, False])
def test_a_server_that_does_not_go_on_with_answers_is_asked_for_whole_ones(
    only_chats: bool, small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    """A position where it does not go on stays the small model's, and ends no run."""
    misfit = LargeNotContinued("elsewhere")
    large = ScriptedLarge([misfit, (70,), misfit])
    large.is_approximate = only_chats
    large.whole_answer = ScriptedWholeAnswer(str(questions[0].answer))
    report, _ = run(small, questions[:4], tmp_path / "r.jsonl", large=large)
    alone = report["sides"]["large"]
    assert alone["calls"] == 4
    assert alone["strict"]["accuracy"] >= 1 / 4
    assert len(large.whole_answer.conversations) == 4
    routed = report["sides"]["entropy 10%"]
    assert routed["unchecked"] > 0


def test_baselines_look_at_places_and_resume(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    routers = ("position", "first", "sentence")
    report, _ = run(small, questions[:4], tmp_path / "r.jsonl", routers=routers)
    names = [f"{router} 10%" for router in routers]
    assert list(report["sides"]) == ["small", "large", *names]
    for name in names:
        side = report["sides"][name]
        assert 0 < side["calls"] <= 0.1 * side["tokens"] + BURST
        assert side["large_tokens_per_question"] == side["calls"] / 4
    saved = [json.loads(line)["row"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    scores = [row["scores"][:3] for row in saved if row["question"] == questions[0].name]
    assert (scores.count([1, 0, 0]), scores.count([0, -1, -2])) == (2, 1)
    pairs = (("first 10%", "position 10%"), ("large", "small"))
    again, large = run(small, questions[:4], tmp_path / "r.jsonl", routers=routers, compare=pairs)
    assert large.contexts == []
    assert again["sides"] == report["sides"]
    assert [(item["first"], item["second"]) for item in again["comparisons"]] == list(pairs)


def test_questions_without_answers_are_judged_by_the_large_model(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    report, _ = run(small, unanswered, tmp_path / "r.jsonl", routers=("entropy", "first"))
    sides = report["sides"]
    assert all(side["strict"] is side["lenient"] is None for side in sides.values())
    assert sides["large"]["with_large"] == {"f1": 1, "interval": [1, 1], "identical": 4}
    assert 0 <= sides["small"]["with_large"]["f1"] < 1
    (pair,) = report["comparisons"]
    assert (pair["first"], pair["second"]) == ("entropy 10%", "first 10%")
    assert pair["with_large"]["difference"] == pytest.approx(
        sides["entropy 10%"]["with_large"]["f1"] - sides["first 10%"]["with_large"]["f1"], abs=2e-4
    )
    text = StringIO()
    print_quality(report, Console(file=text, width=200))
    shown = " ".join(text.getvalue().split())
    assert "F1 with the large iden- large model's" in shown
    assert "side model's answer tical logprob, nats" in shown
    assert "large 100.0 (100..100) 100 -0.50 (-0.5..-0.5) 12.00" in shown
    assert "paired comparisons (sign test, F1)" in shown
    draw_quality(report, tmp_path / "q.svg")
    assert "F1 with the large model's answers" in (tmp_path / "q.svg").read_text()


def test_the_large_model_scores_every_answer_once(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    report, large = run(small, unanswered, tmp_path / "r.jsonl")
    figures = {"token_logprob": -0.5, "interval": [-0.5, -0.5], "answers": len(unanswered)}
    assert [side["by_large"] for side in report["sides"].values()] == [figures] * 3
    assert report["unscored"] is None
    assert len(large.scores.texts) <= 3 * len(unanswered)
    rows = [json.loads(line) for line in (tmp_path / "r.scores").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == len(large.scores.texts)
    assert all(list(row) == ["key", "logprob", "tokens"] for row in rows)
    assert all(row["logprob"] == -0.5 * row["tokens"] for row in rows)

    again, large = run(small, unanswered, tmp_path / "r.jsonl")
    assert (again, large.scores.texts) == (report, [])


def test_an_interrupted_run_scores_the_rest(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    large = ScriptedLarge([(70,)])
    large.scores.error = LargeUnreachable("gone")
    large.scores.failing = lambda text: len(large.scores.texts) > 4
    with pytest.raises(LargeUnreachable, match="gone"):
        run(small, unanswered, tmp_path / "r.jsonl", large=large)
    report, resumed = run(small, unanswered, tmp_path / "r.jsonl")
    assert report["unscored"] is None
    rows = (tmp_path / "r.scores").read_text().splitlines()
    assert len(resumed.scores.texts) == len(rows) - 4


def test_an_interrupted_run_scores_the_rest_after_refused_answers(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    _, large = run(small, unanswered, tmp_path / "scored.jsonl")
    refused, last = set(large.scores.texts[1:4]), large.scores.texts[5]

    def fail_at_last(text: str) -> bool:
        if text == last:
            raise LargeUnreachable("gone")
        return text in refused

    large = ScriptedLarge([(70,)])
    large.scores.error = LargeProtocolError("no logprob here")
    large.scores.failing = fail_at_last
    with pytest.raises(LargeUnreachable, match="gone"):
        run(small, unanswered, tmp_path / "r.jsonl", large=large)
    large.scores.failing = refused.__contains__
    resumed, _ = run(small, unanswered, tmp_path / "r.jsonl", large=large)
    uninterrupted, _ = run(small, unanswered, tmp_path / "all.jsonl", large=large)
    assert resumed["unscored"] == uninterrupted["unscored"]


def test_answers_that_cannot_be_scored_are_counted(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    large = ScriptedLarge([(70,)])
    large.scores.error = LargeProtocolError("no logprob here")
    large_text = small.vocabulary.token_bytes(70).decode() * _TOKENS
    large.scores.failing = lambda text: text == large_text
    report, _ = run(small, unanswered, tmp_path / "r.jsonl", large=large)
    assert report["unscored"] == {"answers": len(unanswered), "reason": "no logprob here"}
    assert report["sides"]["large"]["by_large"] is None
    assert report["sides"]["small"]["by_large"]["token_logprob"] == -0.5


def test_answers_to_one_question_that_cannot_be_scored_do_not_end_the_scoring(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    _, large = run(small, unanswered, tmp_path / "scored.jsonl")
    refused = set(large.scores.texts[:3])
    large = ScriptedLarge([(70,)])
    large.scores.error = LargeProtocolError("no logprob here")
    large.scores.failing = refused.__contains__
    report, _ = run(small, unanswered, tmp_path / "r.jsonl", large=large)
    assert report["sides"]["small"]["by_large"]["answers"] == len(unanswered) - 1
    assert set(large.scores.texts) > refused


def test_a_server_that_scores_nothing_is_asked_about_three_questions_and_named(
    small: SmallModel, unanswered: list[Question], tmp_path: Path
) -> None:
    large = ScriptedLarge([(70,)])
    large.scores.error = LargeProtocolError("no way to score")
    report, _ = run(small, unanswered, tmp_path / "r.jsonl", large=large)
    # All three sides of two questions, and one of the third.
    assert len(large.scores.texts) == 7
    assert [side["by_large"] for side in report["sides"].values()] == [None] * 3
    text = StringIO()
    print_quality(report, Console(file=text, width=200))
    shown = " ".join(text.getvalue().split())
    assert "nats" not in shown
    assert (
        f"are missing for {3 * len(unanswered)} of {3 * len(unanswered)} answers: no way" in shown
    )


def test_questions_with_answers_are_not_scored(whole: WholeRun) -> None:
    assert whole.large.scores.texts == []
    sides = whole.report["sides"].values()
    assert {side["by_large"] for side in sides} == {whole.report["unscored"]} == {None}


def test_cut_off_answers_are_reported(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    report, _ = run(small, questions[:2], tmp_path / "r.jsonl")

    def shown() -> str:
        text = StringIO()
        print_quality(report, Console(file=text, width=200))
        return text.getvalue()

    assert report["sides"]["small"]["reached_limit"] == 2
    assert f"2 of 2 answers of a side were cut off at {_TOKENS} tokens" in shown()
    for side in report["sides"].values():
        side["reached_limit"] = 0
    assert "cut off" not in shown()


def test_an_answer_that_ends_with_the_last_token_is_not_cut_off(
    small: SmallModel,
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.bench.test_quality._TOKENS", 1)
    end = LargeToken(
        token_ids=(small.vocabulary.end_id,),
        text="",
        is_eos=True,
        logprob=-0.5,
        top=(),
        prompt_tokens=10,
        cached_tokens=8,
        completion_tokens=1,
        uploaded_bytes=100,
        latency_s=0.0,
    )
    for _ in range(2):
        report, _ = run(small, questions[:2], tmp_path / "r.jsonl", replies=(end,))
        sides = report["sides"]
        assert [sides[name]["tokens"] for name in ("small", "large")] == [2, 2]
        assert [sides[name]["reached_limit"] for name in ("small", "large")] == [2, 0]


def test_a_step_is_timed_after_the_worked_examples(
    small: SmallModel, questions: list[Question]
) -> None:
    examples = [replace(questions[1], worked_answer="So it is.")]
    assert measure_step_s(small, questions[0], examples) > 0
    ids = small.encode_conversation(question_messages(questions[0], examples)).ids
    assert tuple(small.cached_ids[: len(ids)]) == ids


def test_saved_answers_are_not_repeated(
    small: SmallModel, questions: list[Question], whole: WholeRun, tmp_path: Path
) -> None:
    again, large = run(small, questions, whole.copy_files(tmp_path))
    assert again == whole.report
    assert large.contexts == []


def test_times_of_saved_answers_are_those_of_the_present_machine(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    path, large = tmp_path / "r.jsonl", ScriptedLarge([(70,)], seconds=0.25)
    run(small, questions[:1], path, large=large, step_s=0.5)
    continued, _ = run(small, questions[:2], path, large=large, step_s=0.01)
    whole, _ = run(small, questions[:2], tmp_path / "whole.jsonl", large=large, step_s=0.01)
    for name in ("small", "entropy 10%"):
        seconds = continued["sides"][name]["seconds_median"]
        assert 0 < seconds == whole["sides"][name]["seconds_median"]


def test_saved_answers_of_earlier_versions_keep_their_times(
    small: SmallModel, questions: list[Question], whole: WholeRun, tmp_path: Path
) -> None:
    path = whole.copy_files(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["row"]["calls_s"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, large = run(small, questions, path, step_s=0.5)
    assert large.contexts == []
    assert again["sides"] == whole.report["sides"]


def test_a_prompt_that_occurs_twice_in_a_group_shifts_no_answers(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    right = questions[:4]
    path = tmp_path / "r.jsonl"
    run(small, [right[0], *right], path, chats=5)
    rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    for question in right:
        assert question.answer in [row["text"] for row in rows if row["question"] == question.name]


def test_saved_answers_of_a_model_whose_files_changed_are_not_used(
    small: SmallModel,
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "r.jsonl"
    for fingerprint, count in (("", 3), ("1a", 6), ("1a", 6)):
        monkeypatch.setattr(small, "fingerprint", fingerprint)
        run(small, questions[:1], path)
        assert len(path.read_text().splitlines()) == count


def test_saved_answers_are_graded_by_the_present_answers(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    unanswered = [replace(question, answer=None) for question in questions[:4]]
    run(small, unanswered, tmp_path / "r.jsonl")
    answered, _ = run(small, questions[:4], tmp_path / "r.jsonl")
    assert answered["sides"]["small"]["strict"]["accuracy"] == 1
    corrected = [replace(question, answer="other") for question in questions[:4]]
    report, _ = run(small, corrected, tmp_path / "r.jsonl")
    assert report["sides"]["small"]["lenient"]["accuracy"] == 0


def test_saved_answers_of_code_are_used_only_with_the_same_tests(
    small: SmallModel, tmp_path: Path
) -> None:
    path, lengths = tmp_path / "r.jsonl", []
    for number in (1, 1, 2):
        test = f"def check(f):\n    assert f() == {number}\n"
        function = FunctionTask("f", "def f():\n", test)
        run(small, [Question("q", "?", AnswerKind.CODE, test, function=function)], path)
        lengths.append(len(path.read_text().splitlines()))
    assert lengths == [3, 3, 6]


def test_saved_answers_of_code_are_graded_anew(small: SmallModel, tmp_path: Path) -> None:
    path, test = tmp_path / "r.jsonl", "def check(f):\n    assert False\n"
    function = FunctionTask("f", "def f():\n", test)
    question = Question("q", "?", AnswerKind.CODE, test, function=function)
    first, _ = run(small, [question], path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["row"]["strict"] = row["row"]["lenient"] = True
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    again, large = run(small, [question], path)
    assert large.contexts == []
    assert again == first
    assert again["sides"]["small"]["lenient"]["accuracy"] == 0


def test_an_answer_with_an_incomplete_line_is_repeated(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    first, _ = run(small, questions[:2], path)
    for file in (path, path.with_suffix(".replies")):
        file.write_text(file.read_text()[:-40])
    again, large = run(small, questions[:2], path)
    assert len(large.contexts) <= 1
    assert again == first
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_an_interrupted_run_resumes_to_the_same_report(
    small: SmallModel, questions: list[Question], whole: WholeRun, tmp_path: Path
) -> None:
    good: list[ScriptedReply] = [(70,)] * (len(whole.large.contexts) - 20)
    before = threading.active_count()
    with pytest.raises(LargeError, match="no"):
        run(small, questions, tmp_path / "r.jsonl", replies=(*good, LargeRefused("no")))
    assert threading.active_count() == before
    saved = (tmp_path / "r.jsonl").read_text().splitlines()
    assert 3 <= len(saved) < 24
    resumed, large = run(small, questions, tmp_path / "r.jsonl")
    assert 0 < len(large.contexts) <= 21
    expected = copy.deepcopy(whole.report)
    for report in (expected, resumed):
        # One call returns many tokens once they are recorded.
        for name in ("calls", "uploaded_tokens", "seconds_median"):
            del report["sides"]["large"][name]
    assert resumed == expected


class _FailingLarge(ScriptedLarge):
    """A large model whose calls fail once the file of answers is there."""

    def __init__(self, path: Path) -> None:
        super().__init__([LargeRefused("no")], clock=FakeClock(), seconds=1.0)
        self._path = path

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        if self._path.exists():
            super().wait(ready, timeout_s=timeout_s)
        else:
            time.sleep(0.01)


def test_an_answer_is_saved_whatever_becomes_of_those_written_beside_it(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(LargeRefused):
        run(small, questions[:4], path, large=_FailingLarge(path), chats=4)
    saved = path.read_text()
    assert 0 < saved.count("\n") < 12
    run(small, questions[:4], path, chats=4)
    assert path.read_text().startswith(saved)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 12


def test_saved_answers_have_fixed_names_and_keys(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    run(small, questions[:1], tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    # A key that changes makes the answers of earlier runs unusable.
    assert {line["key"] for line in lines} == {
        "82b750b4c04adf14eaa3fe8b1669368cc29903bd2e624466ca7568f016f90fff",
        "ecfe0dbcd4bc6e630a3dfb003b7d09bc0e8938b9694f0516806e5e6541236268",
        "7287f65a99d159436a19f838720cc1b7f2956596ec28cceb7d578a857064c750",
    }
    for line in lines:
        assert list(line) == ["key", "row"]
        assert list(line["row"]) == [
            "question",
            "text",
            "strict",
            "lenient",
            "tokens",
            "escalated",
            "agreed",
            "unchecked",
            "calls",
            "uploaded_tokens",
            "seconds",
            "calls_s",
            "cut_off",
            "scores",
        ]


def test_the_report_has_fixed_names(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    report, _ = run(small, questions[:1], tmp_path / "r.jsonl")
    assert list(report) == [
        "small",
        "large",
        "questions",
        "examples",
        "form",
        "tokens",
        "chats",
        "accept_within",
        "step_s",
        "sides",
        "unscored",
        "comparisons",
    ]
    for side in report["sides"].values():
        assert list(side) == [
            "router",
            "budget",
            "strict",
            "lenient",
            "with_large",
            "by_large",
            "escalation_rate",
            "large_tokens_per_question",
            "agreement",
            "most_over_budget",
            "tokens",
            "reached_limit",
            "calls",
            "unchecked",
            "uploaded_tokens",
            "seconds_median",
        ]
        for name in ("strict", "lenient"):
            assert list(side[name]) == [
                "accuracy",
                "interval",
                "no_answer",
                "right",
                "over_small",
                "p_against_small",
                "gap_recovered",
                "gap_interval",
            ]


def test_concurrent_answers_equal_those_written_alone(
    small: SmallModel, questions: list[Question]
) -> None:
    conversation = question_messages(questions[0])

    def write(threshold: float, messages: list[Message], small: Any) -> list[int]:
        router = make_router("entropy", threshold=threshold)
        large = ScriptedLarge([(70,), (71,), (72, 73)])
        answer = generate(small, large, messages, router=router, max_tokens=_TOKENS, mode="wait")
        return [token.token_id for token in answer]

    thresholds = [math.inf, 5.0, 4.0, math.inf]
    other = question_messages(Question("x", "a longer question, about something else"))
    answers = ConcurrentAnswers(small, on_abort=lambda: None)
    cases = [(messages, t) for messages in (conversation, other) for t in thresholds]
    written = answers.run([(messages, partial(write, t, messages)) for messages, t in cases])
    assert written == [write(t, messages, small) for messages, t in cases]
    assert len({tuple(token_ids) for token_ids in written}) > 2


class _HeldLarge(ScriptedLarge):
    """A large model whose calls are ready once `released` is set."""

    def __init__(self) -> None:
        super().__init__([(70,)], clock=FakeClock(), seconds=1.0)
        self.has_begun, self.released = threading.Event(), threading.Event()

    def begin(self, context: LargeContext, *, deadline_s: float, prefetch: int) -> FakeCall:
        call = super().begin(context, deadline_s=deadline_s, prefetch=prefetch)
        self.has_begun.set()
        return call

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        self.released.wait(5.0)
        super().wait(ready, timeout_s=timeout_s)


def test_answers_that_wait_for_the_large_model_hold_no_other(
    small: SmallModel, tmp_path: Path
) -> None:
    large, order = _HeldLarge(), []
    # One answer waits for its call, another one for the place of that call.
    recording = RecordingLarge(large, tmp_path / "r", at_once=1)

    def ask(messages: list[Message], client: SharedSmallClient) -> None:
        answer = generate(
            client,
            recording.new_view(blocked=client.blocked),
            messages,
            router=make_router("entropy", threshold=-math.inf),
            max_tokens=2,
            mode="wait",
            strict=True,
        )
        assert len(list(answer)) == 2
        order.append("asked")

    def decode(client: SharedSmallClient) -> None:
        assert large.has_begun.wait(30)
        client.prefill((), sampling=Sampling(), progress=lambda *arguments: None)
        client.extend([70])
        order.append("decoded")
        large.released.set()

    conversations = [question_messages(Question("x", f"{text} " * 20)) for text in ("a", "b", "c")]
    ConcurrentAnswers(small, on_abort=recording.close).run(
        [(messages, partial(ask, messages)) for messages in conversations[:2]]
        + [(conversations[2], decode)]
    )
    assert order == ["decoded", "asked", "asked"]


def test_a_failing_answer_aborts_the_others(small: SmallModel, questions: list[Question]) -> None:
    aborts: list[bool] = []

    def fail(row: Any) -> None:
        row.extend([70])
        raise LargeRefused("no")

    def continue_forever(row: Any) -> None:
        while True:
            row.extend([70])

    answers = ConcurrentAnswers(small, on_abort=lambda: aborts.append(True))
    conversation = question_messages(questions[0])
    before = threading.active_count()
    with pytest.raises(LargeRefused):
        answers.run(
            [
                (conversation, continue_forever),
                (conversation, fail),
                (conversation, continue_forever),
            ]
        )
    assert aborts
    assert threading.active_count() == before


def test_the_failure_that_aborted_the_others_is_raised(
    small: SmallModel, questions: list[Question]
) -> None:
    aborted = threading.Event()

    def wait_for_a_call(row: Any) -> None:
        aborted.wait(30)
        raise RecordingStopped("the run has ended")

    def fail(row: Any) -> None:
        raise LargeRefused("no")

    answers = ConcurrentAnswers(small, on_abort=aborted.set)
    conversation = question_messages(questions[0])
    with pytest.raises(LargeRefused):
        answers.run([(conversation, wait_for_a_call), (conversation, fail)])


def test_oracles_spend_the_budget_where_it_helps() -> None:
    question = Question("q", "?", AnswerKind.CHOICE, "B", (("A", "tea"), ("B", "milk")))

    def make_answer(*labels: str) -> LabelledAnswer:
        texts = [f"The answer is ({label})." for label in labels]
        count = len(texts) - 1
        differs = mx.array([1.0] * count + [0.0] * (10 - count))
        return LabelledAnswer(
            hidden=mx.zeros((10, 1)),
            features=mx.zeros((10, 4)),
            differs=differs,
            logprobs=mx.zeros((10, 2)),
            text=texts[-1],
            token_count=10,
            continuations=tuple(texts[:-1]),
        )

    # Right alone; right with the second disagreement escalated, which is critical; right by luck
    # with the first one, where the large model is wrong; spoiled by the large model.
    answers = [
        make_answer("B", "B"),
        make_answer("A", "A", "B"),
        make_answer("A", "B", "A", "C"),
        make_answer("B", "A"),
    ]
    bounds = compute_oracles(answers, [question] * 4, [0.0, 0.05, 0.1, 0.2])

    def accuracies(name: str) -> list[float]:
        return [point["accuracy"] for point in bounds[name]]

    assert accuracies("gold") == [0.5, 1.0, 1.0, 1.0]
    assert accuracies("disagreements") == [0.5, 0.25, 0.5, 0.5]
    # The second answer costs 2, the third 3, the fourth 1: 0, 2, 4 and 8 may be spent.
    assert accuracies("large_outcome") == [0.5, 0.25, 0.5, 0.5]
    spent = [point["large_tokens_per_question"] for point in bounds["large_outcome"]]
    assert spent == [0, 0.25, 0.75, 1.5]
    # Its ceiling is the large model alone.
    assert accuracies("large_outcome")[-1] == 2 / 4
    assert bounds["gold"][1]["escalation_rate"] == pytest.approx(2 / 40)
    assert list(bounds) == [*ORACLES, "finding_the_critical"]
    assert list(bounds["gold"][0]) == [
        "budget",
        "escalation_rate",
        "large_tokens_per_question",
        "accuracy",
    ]
    recall = bounds["finding_the_critical"]
    assert (recall["differing"], recall["to_find"]) == pytest.approx((0.175, 0.125), abs=1e-3)


def test_the_plot_shows_every_router(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    report, _ = run(small, questions[:2], tmp_path / "r.jsonl")
    # Reports of earlier versions have no large tokens per question.
    point = {"budget": 0.05, "escalation_rate": 0.04, "accuracy": 0.5}
    report["oracles"] = {name: [point] for name in ORACLES}
    draw_quality(report, tmp_path / "q.svg")
    drawing = (tmp_path / "q.svg").read_text()
    for label in ("entropy", "large tokens a question", *ORACLES.values()):
        assert f"<!-- {label} -->" in drawing


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ({"prompt": "Why?"}, ["--oracles"], "row 1 has no answer to compare with; --oracles"),
        (
            {"prompt": "Why?", "answer": "so", "cot": "so"},
            ["--shots", "2"],
            "too few rows with a `cot`: 1 of the 2 needed",
        ),
        ({"prompt": ""}, [], "row 1: `prompt` must be"),
    ],
)
def test_bench_quality_names_what_is_missing(
    row: dict[str, str],
    more: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(row) + "\n")
    arguments = ["bench", "quality", "--data", str(file), "--large", "http://127.0.0.1:9/v1"]
    if "--shots" in more:
        arguments += ["--examples", str(file)]
    arguments += more
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_either_all_questions_have_an_answer_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "Why?", "answer": "so"}\n{"prompt": "How?"}\n')
    assert main(["bench", "quality", "--data", str(file), "--large", "http://127.0.0.1:9/v1"]) == 2
    assert ".jsonl: row 2 has no answer to compare with; other rows have one" in " ".join(
        capsys.readouterr().err.split()
    )


def test_bench_quality_needs_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "Why?", "answer": "so"}\n')
    assert main(["bench", "quality", "--data", str(file)]) == 2
    assert "--large URL" in capsys.readouterr().err
