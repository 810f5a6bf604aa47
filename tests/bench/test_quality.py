"""`bench quality`: every side on every question, nothing asked twice, budgets kept."""

from __future__ import annotations

import json
import math
import threading
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from rich.console import Console

from mlxroute.backend.load import load
from mlxroute.bench.concurrent_answers import ConcurrentAnswers
from mlxroute.bench.oracles import compute_oracles
from mlxroute.bench.plot import draw_quality
from mlxroute.bench.quality import LARGE, ORACLES, SMALL, QualityResults, bench_quality, make_sides
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.commands.bench_quality import print_quality
from mlxroute.engine import generate
from mlxroute.errors import LargeError, LargeRefused
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.recorded.replies import RecordingStopped, Replies
from mlxroute.routers import BURST, make_router
from mlxroute.small import SmallModel
from mlxroute.training.labels import LabelledAnswer
from mlxroute.types import Message
from tests.support.fakes import Reply, ScriptedLarge
from tests.support.tiny import make_tiny_model

_TOKENS = 12
_RANKS = ScoreRanks("tiny", "none", 0, {"entropy": (0.0, 6.0)})


class Named(ScriptedLarge):
    """A scripted large model with a name."""

    model_name = "scripted"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


@pytest.fixture(scope="module")
def questions(small: SmallModel) -> list[Question]:
    """The small model's own answers are right to the first half."""
    found = []
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
        found.append(Question(str(i), prompt, AnswerKind.TEXT, text if i < 4 else "never said"))
    return found


def run(
    small: SmallModel,
    questions: list[Question],
    path: Path,
    *,
    replies: tuple[Reply, ...] = ((70,),),
) -> tuple[dict[str, Any], Named]:
    large = Named(replies)
    with Replies(large, path.with_suffix(".replies")) as kept:
        report = bench_quality(
            small,
            kept,
            questions,
            sides=make_sides(["entropy"], [0.1]),
            examples=[],
            ranks=_RANKS,
            max_tokens=_TOKENS,
            step_s=0.01,
            results=QualityResults(path),
        )
    return report, large


def test_the_sides_are_marked_and_compared(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    report, large = run(small, questions, tmp_path / "r.jsonl")
    sides = report["sides"]
    assert list(sides) == [SMALL.name, LARGE.name, "entropy 10%"]
    alone = sides["small"]
    assert (alone["strict"]["accuracy"], alone["calls"], alone["escalation_rate"]) == (0.5, 0, 0)
    assert sides["large"]["strict"]["accuracy"] == 0
    assert sides["large"]["escalation_rate"] == 1
    assert sides["large"]["strict"]["p_against_small"] == 0.125
    assert sides["large"]["strict"]["over_small"] == 0
    # What one side asked the others need not ask again.
    asked = [tuple(context.token_ids) for context in large.contexts]
    assert len(asked) == len(set(asked))
    assert len(asked) <= sides["large"]["calls"] + sides["entropy 10%"]["calls"]
    # One budget for all questions in a row.
    routed = sides["entropy 10%"]
    assert 0 < routed["calls"] <= 0.1 * routed["tokens"] + BURST
    assert 0 < routed["most_over_budget"] <= BURST


def test_answers_that_were_cut_off_are_told_of(
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


def test_what_is_there_is_not_asked_again(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    first, _ = run(small, questions, tmp_path / "r.jsonl")
    again, large = run(small, questions, tmp_path / "r.jsonl")
    assert again == first
    assert large.contexts == []


def test_a_line_that_was_not_written_to_its_end_is_answered_again(
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


def test_an_interrupted_run_goes_on_to_the_same_report(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    whole, large = run(small, questions, tmp_path / "whole.jsonl")
    good: list[Reply] = [(70,)] * (len(large.contexts) - 20)
    before = threading.active_count()
    with pytest.raises(LargeError, match="no"):
        run(small, questions, tmp_path / "r.jsonl", replies=(*good, LargeRefused("no")))
    assert threading.active_count() == before
    kept = (tmp_path / "r.jsonl").read_text().splitlines()
    assert 3 <= len(kept) < 24
    resumed, large = run(small, questions, tmp_path / "r.jsonl")
    assert 0 < len(large.contexts) <= 21
    for report in (whole, resumed):
        # Tokens that are known come many a call.
        for name in ("calls", "uploaded_tokens", "seconds_median"):
            del report["sides"]["large"][name]
    assert resumed == whole


def test_answers_written_together_are_those_written_alone(
    small: SmallModel, questions: list[Question]
) -> None:
    turns = question_messages(questions[0])

    def alone(threshold: float, turns: list[Message], small: Any) -> list[int]:
        router = make_router("entropy", threshold=threshold)
        large = Named([(70,), (71,), (72, 73)])
        answer = generate(small, large, turns, router=router, max_tokens=_TOKENS, mode="wait")
        return [token.token_id for token in answer]

    thresholds = [math.inf, 5.0, 4.0, math.inf]
    other = question_messages(Question("x", "a longer question, about something else"))
    together = ConcurrentAnswers(small, on_abort=lambda: None)
    jobs = [(each, partial(alone, t, each)) for each in (turns, other) for t in thresholds]
    found = together.run(jobs)
    assert found == [alone(t, each, small) for each in (turns, other) for t in thresholds]
    assert len({tuple(each) for each in found}) > 2


def test_a_fault_in_one_answer_ends_the_others(
    small: SmallModel, questions: list[Question]
) -> None:
    stopped: list[bool] = []

    def fails(row: Any) -> None:
        row.extend([70])
        raise LargeRefused("no")

    def goes_on(row: Any) -> None:
        while True:
            row.extend([70])

    together = ConcurrentAnswers(small, on_abort=lambda: stopped.append(True))
    turns = question_messages(questions[0])
    before = threading.active_count()
    with pytest.raises(LargeRefused):
        together.run([(turns, goes_on), (turns, fails), (turns, goes_on)])
    assert stopped
    assert threading.active_count() == before


def test_the_fault_that_ended_the_others_is_told(
    small: SmallModel, questions: list[Question]
) -> None:
    over = threading.Event()

    def waits_for_a_call(row: Any) -> None:
        over.wait(30)
        raise RecordingStopped("the run has ended")

    def fails(row: Any) -> None:
        raise LargeRefused("no")

    together = ConcurrentAnswers(small, on_abort=over.set)
    turns = question_messages(questions[0])
    with pytest.raises(LargeRefused):
        together.run([(turns, waits_for_a_call), (turns, fails)])


def test_oracles_spend_where_it_helps() -> None:
    question = Question("q", "?", AnswerKind.CHOICE, "B", (("A", "tea"), ("B", "milk")))

    def answered(*labels: str) -> LabelledAnswer:
        texts = [f"The answer is ({each})." for each in labels]
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

    # Right by itself; by the second disagreement, the first of which is critical; in vain.
    answers = [answered("B", "B"), answered("A", "A", "B"), answered("A", "A", "A")]
    found = compute_oracles(answers, [question] * 3, [0.0, 0.05, 0.1])
    assert [each["accuracy"] for each in found["critical_first"]] == pytest.approx(
        [0.3333, 0.6667, 0.6667]
    )
    assert found["critical_first"][1]["escalation_rate"] == pytest.approx(1 / 30, abs=1e-4)
    assert [each["accuracy"] for each in found["disagreements"]] == pytest.approx([0.3333] * 3)
    assert compute_oracles(answers, [question] * 3, [0.2])["disagreements"][0]["accuracy"] == 0.6667
    finding = found["finding_the_critical"]
    assert (finding["differing"], finding["to_find"]) == pytest.approx((0.1667, 0.0333), abs=1e-3)


def test_the_picture_shows_every_router(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    report, _ = run(small, questions[:2], tmp_path / "r.jsonl")
    point = {"budget": 0.05, "escalation_rate": 0.04, "accuracy": 0.5}
    report["oracles"] = {name: [point] for name in ORACLES}
    draw_quality(report, tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ({"prompt": "Why?"}, [], "row 1 has no answer to compare with"),
        (
            {"prompt": "Why?", "answer": "so", "cot": "so"},
            ["--shots", "2"],
            "2 rows with a `cot` are needed, but it has 1",
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
    if more:
        arguments += ["--examples", str(file), *more]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_bench_quality_needs_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "Why?", "answer": "so"}\n')
    assert main(["bench", "quality", "--data", str(file)]) == 2
    assert "--large URL" in capsys.readouterr().err
