"""Many users of one replica, on a virtual clock."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).parents[2] / "bench" / "many_users.py"
_FLAGS = ("--step-ms", "20", "--call-ms", "50", "--at-once", "8")
# Of a user whose calls wait for no other user's: calls of 80 ms with the path.
_TOKENS_PER_S = 1 / (0.02 + 0.07 * 0.08)


def _play(monkeypatch: pytest.MonkeyPatch, users: tuple[int, ...], *flags: str) -> dict[str, Any]:
    monkeypatch.syspath_prepend(_SCRIPT.parent)
    many_users = importlib.import_module("many_users")
    monkeypatch.setattr(many_users, "USERS", users)
    monkeypatch.setattr(sys, "argv", [str(_SCRIPT), *_FLAGS, *flags])
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        many_users.main()
    report: dict[str, Any] = json.loads(stdout.getvalue())
    return report


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _play(monkeypatch, (10, 10_000), "--path-ms", "30")


def test_few_users_do_not_wait_for_each_other(report: dict[str, Any]) -> None:
    few = report["users"][0]
    assert few["users"] == 10
    assert few["call_p50_s"] == 0.08
    assert few["tokens_per_s_of_a_user"] == pytest.approx(_TOKENS_PER_S, rel=0.05)
    assert few["calls_per_s"] == pytest.approx(10 * _TOKENS_PER_S * 0.07, rel=0.1)


def test_too_many_users_share_the_capacity(report: dict[str, Any]) -> None:
    many = report["users"][-1]
    assert report["capacity_calls_per_s"] == 160
    assert many["calls_per_s"] == pytest.approx(160, rel=0.02)
    assert many["tokens_per_s_of_a_user"] == pytest.approx(160 / 0.07 / 10_000, rel=0.1)


def test_more_calls_for_each_escalation_cost_capacity(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report["most_users"] == round(160 / (0.07 * _TOKENS_PER_S))
    several = _play(monkeypatch, (10,), "--path-ms", "30", "--calls-per-escalation", "2")
    assert several["most_users"] < report["most_users"]


@pytest.mark.parametrize("calls", [1, 0])
def test_a_slow_replica_is_timed_by_its_calls(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(_SCRIPT.parent)
    real_replica = importlib.import_module("real_replica")
    figures = {"calls": calls, "calls_per_s": round(calls / 400, 2)}
    monkeypatch.setattr(real_replica, "run", lambda *_, **__: figures)
    if calls:
        assert real_replica.time_busy_replica([], None, 0.07, 2, 400.0) == 800
    else:
        with pytest.raises(SystemExit, match="no call ended in 400 s; use more --seconds"):
            real_replica.time_busy_replica([], None, 0.07, 2, 400.0)
