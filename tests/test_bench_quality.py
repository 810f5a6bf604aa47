"""`bench quality`: every side on every question, nothing asked twice, budgets kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.bench.plot import draw_quality
from mlxroute.bench.quality import LARGE, SMALL, Results, bench_quality, sides_of
from mlxroute.cli import main
from mlxroute.engine import generate
from mlxroute.errors import LargeError, LargeRefused
from mlxroute.questions import Kind, Question
from mlxroute.ranks import Ranks
from mlxroute.routers import BURST, make
from mlxroute.small import SmallModel
from tests.fakes import Reply, ScriptedLarge
from tests.tiny import make_tiny_model

_TOKENS = 12
_RANKS = Ranks("tiny", "none", 0, {"entropy": (0.0, 6.0)})


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
            small, None, prompt, router=make("entropy", threshold=math.inf), max_tokens=_TOKENS
        )
        text = "".join(token.text for token in answer)
        found.append(Question(str(i), prompt, Kind.TEXT, text if i < 4 else "never said"))
    return found


def run(
    small: SmallModel,
    questions: list[Question],
    path: Path,
    *,
    replies: tuple[Reply, ...] = ((70,),),
) -> tuple[dict[str, Any], Named]:
    large = Named(replies)
    report = bench_quality(
        small,
        large,
        questions,
        sides=sides_of(["entropy"], [0.1]),
        examples=[],
        ranks=_RANKS,
        tokens=_TOKENS,
        results=Results(path),
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
    assert len(large.contexts) == sides["large"]["calls"] + sides["entropy 10%"]["calls"]
    # One budget for all questions in a row.
    routed = sides["entropy 10%"]
    assert 0 < routed["calls"] <= 0.1 * routed["tokens"] + BURST


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
    path.write_text(path.read_text()[:-40])
    again, large = run(small, questions[:2], path)
    assert len(large.contexts) == again["sides"]["entropy 10%"]["calls"] - first_calls(path)
    assert again["sides"]["small"] == first["sides"]["small"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def first_calls(path: Path) -> int:
    """The calls of the first routed answer."""
    rows = [json.loads(line)["row"] for line in path.read_text().splitlines()]
    return int(rows[4]["calls"])


def test_an_interrupted_run_goes_on_to_the_same_report(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    whole, large = run(small, questions, tmp_path / "whole.jsonl")
    # In the middle of the routed answers.
    good: list[Reply] = [(70,)] * (len(large.contexts) - 2)
    with pytest.raises(LargeError):
        run(small, questions, tmp_path / "r.jsonl", replies=(*good, LargeRefused("no")))
    kept = (tmp_path / "r.jsonl").read_text().splitlines()
    assert 16 < len(kept) < 24
    resumed, large = run(small, questions, tmp_path / "r.jsonl")
    assert 0 < len(large.contexts) < len(good)
    for report in (whole, resumed):
        for side in report["sides"].values():
            del side["seconds_median"]
    assert resumed == whole


def test_the_picture_shows_every_router(
    small: SmallModel, questions: list[Question], tmp_path: Path
) -> None:
    report, _ = run(small, questions[:2], tmp_path / "r.jsonl")
    draw_quality(report, tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ({"prompt": "Why?"}, [], "row 1 has no answer to compare with"),
        ({"prompt": "Why?", "answer": "so", "cot": "so"}, ["--shots", "2"], "1 rows have a `cot`"),
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
