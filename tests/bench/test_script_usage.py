"""The measuring scripts say how they are used."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

_SCRIPTS = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    "command",
    [
        "by_example.py",
        "endpoint_speed.py",
        "endpoint_speed.py nothing",
        "equal_answers.py",
        "equal_answers.py http://127.0.0.1:1/v1 X rows.jsonl",
        "many_users.py --step-ms 20 --call-ms 50 --at-once 8 --rate 100%",
        "many_users.py --step-ms 20 --call-ms 50 --at-once 8 --rate 0",
        "many_users.py --step-ms 20 --call-ms 50 --at-once 8 --rate 7",
        "many_users.py --step-ms 20 --call-ms 50 --at-once 8 --calls-per-escalation 20",
        "many_users.py --step-ms 20 --call-ms 50 --at-once 0",
        "many_users.py --step-ms 20 --call-ms 0 --at-once 8",
        "many_users.py --step-ms 0 --call-ms 50 --at-once 8",
        "many_users.py --step-ms 20 --call-ms nan --at-once 8",
        "many_users.py --step-ms 20 --call-ms 50 --at-once 8 --path-ms -1",
        "real_replica.py http://127.0.0.1:1/v1 --rate 100%",
        "real_replica.py http://127.0.0.1:1/v1 --seconds 0",
        "real_replica.py http://127.0.0.1:1/v1 --callers 0",
        "serving_throughput.py",
        "serving_throughput.py nothing",
        "shared_machine.py",
        "shared_machine.py http://127.0.0.1:1/v1 1 32 fast",
    ],
)
def test_wrong_arguments_are_answered_with_the_usage(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(_SCRIPTS)
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(_SCRIPTS / script), run_name="__main__")
    assert exit_info.value.code == 2
    assert f"usage: {script}" in capsys.readouterr().err
