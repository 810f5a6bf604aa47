"""Heads: which file is used, and that a head is not evaluated on its training questions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import pytest

from mlxroute.catalog import Catalog, shipped_dir
from mlxroute.catalog.head_files import find_head_file, user_head_file
from mlxroute.catalog.model_keys import plain_name
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.commands.bench_quality import check_measurable
from mlxroute.cli.routing import choose_router, choose_router_name, warn_of_other_head
from mlxroute.cli.terminal import make_consoles
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import UsageError
from mlxroute.questions.question_files import Question, read_questions
from mlxroute.routers import Budget, Threshold
from mlxroute.small import SmallModel
from mlxroute.small.mlp_head import SIGNAL_COUNT, MlpHead
from tests.support.tiny import make_tiny_model

_SHIPPED = sorted((shipped_dir() / "heads").rglob("*.safetensors"))
_SHARED = Path(__file__).parents[3] / "shared" / "data" / "csqa"


def head_of(file: Path) -> tuple[MlpHead, dict[str, str]]:
    arrays, about = mx.load(str(file), return_metadata=True)
    assert isinstance(arrays, dict)
    assert isinstance(about, dict)
    size = arrays["0.weight"].shape[1] - SIGNAL_COUNT
    return MlpHead.load(file, hidden_size=size), about


def test_the_users_head_takes_precedence_over_the_shipped_one(tmp_path: Path) -> None:
    small = _SHIPPED[0].stem
    assert find_head_file(small, tmp_path) == _SHIPPED[0]
    users_head = user_head_file(small, tmp_path)
    users_head.parent.mkdir()
    users_head.touch()
    assert find_head_file(small, tmp_path) == users_head
    assert find_head_file("unknown-model", tmp_path) is None


def test_every_model_has_a_head_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = _SHIPPED[0].stem
    monkeypatch.chdir(tmp_path)
    folders = ["runs/a/fused", "runs/b/fused", small, f"tuned/{small}"]
    for folder in folders:
        Path(folder).mkdir(parents=True)
    names = [
        *("runs/a/fused", "runs/b/fused", "runs/a/fused+1a2b3c4d", f"./{small}", f"tuned/{small}"),
        *("org1/X", "org2/X", "a/model.gguf", "b/model.gguf", small, f"{small}+1a2b3c4d", "."),
    ]
    files = {name: user_head_file(name, tmp_path) for name in names}
    assert len(set(files.values())) == len(names)
    assert files[small].stem == small
    assert files["."].stem.startswith(f"{tmp_path.name}-")
    # The same folder, however it is named.
    assert user_head_file(str(tmp_path / "runs/a/fused"), tmp_path) == files["runs/a/fused"]
    assert user_head_file("runs/b/../a/fused", tmp_path) == files["runs/a/fused"]
    assert find_head_file(f"./{small}", tmp_path) is None
    assert find_head_file(small, tmp_path) == _SHIPPED[0]


@pytest.mark.parametrize(
    ("fitted_to", "small", "is_warned"),
    [
        ("smollm2-135m", "smollm2-135m", False),
        ("smollm2-135m", "smollm2-135m+1a2b3c4d", False),
        ("runs/a/fused+1a2b3c4d", "/home/me/runs/a/fused", False),
        ("", "smollm2-135m", False),
        ("smollm2-135m", "qwen2.5-0.5b", True),
        ("smollm2-135m", "tuned/mine", True),
    ],
)
def test_a_head_of_another_model_is_used_with_a_warning(
    fitted_to: str, small: str, is_warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SimpleNamespace(head=MlpHead((), small=fitted_to), plain_name=plain_name(small))
    _, err = make_consoles()
    warn_of_other_head(cast("SmallModel", model), err)
    assert ("the head was fitted to smollm2-135m" in capsys.readouterr().err) is is_warned


def test_a_session_warns_of_a_head_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, file = make_tiny_model(tmp_path / "tiny"), tmp_path / "h.safetensors"
    size = json.loads((tiny / "config.json").read_text())["hidden_size"] + SIGNAL_COUNT
    for fitted_to in ("other", "tiny"):
        arrays = {"0.weight": mx.zeros((1, size)), "0.bias": mx.zeros(1)}
        mx.save_safetensors(str(file), arrays, {"report": json.dumps({"small": fitted_to})})
        arguments = ["--small", str(tiny), "--head", str(file), "--max-tokens", "1", "--offline"]
        assert main(["ask", *arguments, "hi"]) == 0
        warned = "the head was fitted to other" in capsys.readouterr().err
        assert warned is (fitted_to == "other")


@pytest.mark.parametrize("file", _SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_shipped_head_is_small_and_names_its_origin(file: Path) -> None:
    head, about = head_of(file)
    report = json.loads(about["report"])
    assert file.stat().st_size < 500_000
    assert report["small"] == head.small == file.stem
    assert len(head.questions) == sum(report["answers"].values())
    assert len(head.quantiles) > 50
    card = file.with_suffix(".md").read_text(encoding="utf-8")
    for fact in (report["large"].removesuffix(".gguf"), report["labels"], "MIT"):
        assert fact in card


@pytest.mark.heavy
@pytest.mark.parametrize("file", _SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_no_test_question_was_trained_on(file: Path) -> None:
    head, _ = head_of(file)
    tested = {question.fingerprint for question in read_questions(_SHARED / "test.jsonl")}
    trained = {question.fingerprint for question in read_questions(_SHARED / "train_router.jsonl")}
    assert not head.questions & tested
    assert head.questions <= trained


def test_a_head_is_not_evaluated_on_questions_it_was_fitted_to() -> None:
    questions = [Question(str(i), f"say {i}") for i in range(3)]
    head = MlpHead((), (0.0, 1.0), frozenset([questions[1].fingerprint]))
    with pytest.raises(UsageError, match="fitted to 1 of these 3 questions"):
        check_measurable(head, questions)
    check_measurable(head, questions[:1])
    check_measurable(None, questions)
    with pytest.raises(UsageError, match="no quantiles of its scores"):
        check_measurable(MlpHead(()), questions)


def test_a_model_without_a_head_is_named_in_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    assert main(["ask", "--small", str(tiny), "--router", "head", "--offline", "hi"]) == 2
    advice = "tiny; fit one with `mlxroute train`, or name one with --head FILE"
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize("name", ["entropy", "margin"])
def test_every_router_has_a_budget_of_7_percent_unless_a_threshold_is_set(name: str) -> None:
    ranks = ScoreRanks.find("qwen2.5-coder-0.5b", user_catalog_dir())

    def state(settings: Settings) -> Threshold | Budget:
        return choose_router(name, settings, ranks).state

    by_default, budget = state(Settings()), state(Settings(budget=0.03))
    assert isinstance(by_default, Budget)
    assert isinstance(budget, Budget)
    assert (by_default.rate, budget.rate) == (0.07, 0.03)
    # It starts from the calibration.
    assert by_default.threshold == pytest.approx(ranks.threshold_at_rate(name, 0.07), rel=0.15)
    assert state(Settings(threshold=1.5)) == Threshold(1.5)


def test_the_router_is_that_of_the_settings_else_that_of_the_pair() -> None:
    pair = Catalog.load().find_pair("qwen2.5-coder-0.5b")
    assert pair is not None
    assert choose_router_name(Settings(), pair) == pair.router
    assert choose_router_name(Settings(router="logu"), pair) == "logu"
    # A threshold alone is in nats.
    assert choose_router_name(Settings(threshold=1.0), pair) == "entropy"
    assert choose_router_name(Settings(), None) == "entropy"
    # A head that is named is used, unless a router is named too.
    assert choose_router_name(Settings(head="h.safetensors", threshold=0.5), pair) == "head"
    assert choose_router_name(Settings(head="h.safetensors", router="logu"), pair) == "logu"
