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
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(_SCRIPTS / script), run_name="__main__")
    assert exit_info.value.code == 2
    assert f"usage: {script}" in capsys.readouterr().err
