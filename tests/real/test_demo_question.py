"""The demo with real models: one model as both, and the shipped question with its own pair."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mlxroute import EntropyRouter, LargeModel
from mlxroute.catalog import Pair
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import demo_story, main
from mlxroute.cli.routing import RoutingRule
from mlxroute.cli.session import Session
from mlxroute.config import Settings
from mlxroute.hosting.launcher import LocalServer
from mlxroute.ledger import Ledger
from mlxroute.questions.demo_question import DemoQuestion
from mlxroute.small import SmallModel
from tests.conftest import CACHE_DIR


def test_one_model_in_both_roles_writes_one_answer_three_times(
    smollm2: SmallModel, host: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_story, "MAX_TOKENS", 6)
    out, err = io.StringIO(), io.StringIO()
    pair = Pair("smollm2-135m", "smollm2-135m", True, 1.0, "none")
    with LargeModel(host.url, timeout_s=60) as large:
        routing = RoutingRule(EntropyRouter(1.0), ScoreRanks("tiny", "none", 0, {}), has_large=True)
        session = Session(
            smollm2,
            large,
            Settings(max_tokens=6, timeout=60),
            routing=routing,
            ledger=Ledger(),
            never_send=(),
        )
        demo_story.tell_story(
            session,
            pair,
            DemoQuestion("Name three fruits."),
            heat=False,
            out=Console(file=out, width=200),
            err=Console(file=err, width=200),
        )
    thirds = out.getvalue().splitlines()
    assert len(thirds) % 3 == 0
    size = len(thirds) // 3
    assert thirds[:size] == thirds[size : 2 * size] == thirds[2 * size :]
    assert "the same" in err.getvalue()


@pytest.mark.heavy
def test_the_shipped_question_comes_out_as_it_was_chosen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--cache-dir", str(CACHE_DIR)]) == 0
    captured = capsys.readouterr()
    assert "the answer became right" in " ".join(captured.err.split())
    assert "CO2" in captured.out
