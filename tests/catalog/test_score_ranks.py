"""Score ranks: shipped files, the user's files, and how `calibrate` writes them."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.catalog import Catalog
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.worked_examples import read_examples
from mlxroute.config import user_catalog_dir
from mlxroute.engine import generate
from mlxroute.engine.answer import Answer
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.errors import CatalogError
from mlxroute.questions.question_files import (
    AnswerKind,
    Question,
    question_messages,
    read_questions,
    sample_questions,
)
from mlxroute.routers import SCORES, make_router
from mlxroute.small import SmallModel
from mlxroute.training import calibration
from mlxroute.types import Message
from tests.support.tiny import make_tiny_model


def make_ranks(small: str) -> ScoreRanks:
    return ScoreRanks(small, "a file", 500, {"entropy": (0.0, 0.5, 1.0, 2.0, 4.0)})


def test_the_users_ranks_take_precedence_over_the_shipped_ones(tmp_path: Path) -> None:
    shipped = ScoreRanks.find("qwen2.5-coder-0.5b", tmp_path)
    assert shipped.small == "qwen2.5-coder-0.5b"
    make_ranks("qwen2.5-coder-0.5b").write(tmp_path)
    assert ScoreRanks.find("qwen2.5-coder-0.5b", tmp_path) == make_ranks("qwen2.5-coder-0.5b")
    assert ScoreRanks.find("some/folder/unknown-model", tmp_path) == shipped


def test_models_with_the_same_last_name_have_ranks_of_their_own(tmp_path: Path) -> None:
    shipped = ScoreRanks.find("qwen2.5-coder-0.5b", tmp_path)
    for small in ("org1/X", "org2/X"):
        make_ranks(small).write(tmp_path)
        assert ScoreRanks.find(small, tmp_path).small == small
    assert ScoreRanks.find("org1/X", tmp_path).small == "org1/X"
    assert ScoreRanks.find("org3/X", tmp_path) == shipped


def test_the_threshold_at_a_rate_is_exceeded_by_that_share() -> None:
    ranks = make_ranks("x")
    assert [ranks.threshold_at_rate("entropy", rate) for rate in (0.0, 0.25, 0.125, 1.0)] == [
        4.0,
        2.0,
        3.0,
        0.0,
    ]
    assert ranks["not calibrated"] == (0.0, 1.0)


def test_a_failed_write_keeps_the_old_ranks(tmp_path: Path) -> None:
    make_ranks("x").write(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/x\.json'$"):
            replace(make_ranks("x"), data="d" * 5000).write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ScoreRanks.find("x", tmp_path) == make_ranks("x")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"small": "x"}', '{"small":"x","data":"d","positions":1,"quantiles":{"a":[2,1]}}'],
)
def test_an_invalid_file_is_named_in_the_error(tmp_path: Path, text: str) -> None:
    path = make_ranks("x").write(tmp_path)
    path.write_text(text)
    with pytest.raises(CatalogError, match=r"x\.json"):
        ScoreRanks.find("x", tmp_path)


@pytest.mark.parametrize("small", sorted({pair.small for pair in Catalog.load().pairs}))
def test_every_small_model_of_the_catalogue_has_ranks_for_budgets(
    small: str, tmp_path: Path
) -> None:
    ranks = ScoreRanks.find(small, tmp_path)
    assert ranks.positions > 500
    for name in ("entropy", "margin", "max-probability", "logu", "random"):
        threshold = make_router(name, budget=0.07, quantiles=ranks[name]).state.threshold
        assert threshold == pytest.approx(ranks.threshold_at_rate(name, 0.07), rel=0.15)


def test_calibrate_writes_the_ranks_that_budgets_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(9)))
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", "--small", str(tiny), "--data", data.name, "--tokens", "24"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    ranks = ScoreRanks.find(str(tiny), user_catalog_dir())
    assert ranks.positions == report["positions"] >= 200
    assert ranks.data == report["data"] == f"9 questions of {tmp_path.name}/mine.jsonl"
    assert report["thresholds"]["entropy"]["0.07"] == round(
        ranks.threshold_at_rate("entropy", 0.07), 5
    )
    # A head needs hidden states, so it brings its own.
    assert set(ranks.quantiles) == set(SCORES) - {"head"}


def test_a_score_that_is_never_finite_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `logu` is NaN at every position of a model whose highest logits are negative.
    broken = replace(SCORES["logu"], function=lambda signals, number: math.nan)
    monkeypatch.setitem(SCORES, "logu", broken)
    model, tokenizer = load(make_tiny_model(tmp_path / "tiny"))
    small = SmallModel(model, tokenizer, name="tiny")
    questions = [Question(str(i), f"say {i}", AnswerKind.TEXT, None) for i in range(9)]
    ranks = calibration.calibrate(small, questions, examples=[], data="mine", max_tokens=24)
    assert set(ranks.quantiles) == set(SCORES) - {"head", "logu"}


@pytest.mark.parametrize(
    ("options", "examples", "description"),
    [
        ([], 4, "8 questions of {}/problems.jsonl after 4 worked examples"),
        (["--shots", "0"], 0, "8 questions of {}/problems.jsonl"),
    ],
)
def test_calibrate_asks_in_the_form_of_bench_quality(
    options: list[str],
    examples: int,
    description: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = make_tiny_model(tmp_path / "tiny", context=2048)
    data = tmp_path / "problems.jsonl"
    rows = [{"problem": f"What is {i} + 1?", "solution": f"\\boxed{{{i + 1}}}"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers: list[Answer] = []

    def generate_and_keep(
        small: SmallProtocol, large: None, messages: Sequence[Message], **rest: Any
    ) -> Answer:
        asked.append(messages)
        answers.append(generate(small, large, messages, **rest))
        return answers[-1]

    asked: list[Sequence[Message]] = []
    monkeypatch.setattr(calibration, "generate", generate_and_keep)
    arguments = ["calibrate", "--small", str(tiny), "--data", str(data), "--tokens", "26"]
    assert main([*arguments, *options]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == description.format(tmp_path.name)
    questions = sample_questions(read_questions(data), len(rows))
    worked = read_examples(None, examples, questions)
    assert asked == [question_messages(question, worked) for question in questions]
    if examples:
        # The examples are read once.
        shares = [answer.stats().cached_prompt_tokens for answer in answers[1:]]
        prompts = [len(answer.prompt_ids) for answer in answers[1:]]
        assert min(shares) > 0.8 * max(prompts)


def test_calibrate_refuses_too_few_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(f'{{"prompt": "say {number}"}}\n' for number in range(4)))
    few = ["calibrate", "--small", str(tiny), "--data", str(data), "--tokens", "50"]
    monkeypatch.setattr("mlxroute.training.calibration.generate", lambda *_, **__: ())
    assert main(few) == 2
    assert "positions, and 200 are needed" in capsys.readouterr().err


def test_calibrate_refuses_too_few_positions_before_it_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("an answer is written before the mistake is reported")

    monkeypatch.setattr("mlxroute.training.calibration.generate", fail)
    tiny = make_tiny_model(tmp_path / "tiny")
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "say"}\n{"prompt": "tell"}\n')
    assert main(["calibrate", "--small", str(tiny), "--data", str(data), "--tokens", "99"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "with at most 99 tokens give at most 198 positions, and 200 are needed" in error
