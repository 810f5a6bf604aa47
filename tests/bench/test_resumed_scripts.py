"""Scripts of `bench/` that continue a file of rows."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.serving.soak.planned_requests import choose_large_token
from tests.support.loopback import Loopback
from tests.support.negotiated import honest
from tests.support.tiny import make_tiny_model

_SCRIPT = Path(__file__).parents[2] / "bench" / "equal_answers.py"


def test_moved_logprobs_are_counted_where_answers_are_compared() -> None:
    compare = runpy.run_path(str(_SCRIPT))["compare"]
    base = [[7, "large", [["a", -0.5], ["b", -1.0]]]]
    moved = [[7, "large", [["a", -0.5], ["b", -1.2]]]]
    report = compare({("wait", 0, 0): base, ("hedge", 0, 0): moved}, 0.0)
    assert report["equal_to_wait"] == {"wait, prefetch 0": 1, "hedge, prefetch 0": 1}
    figures = {"positions": 1, "share_moved": 1.0, "median": 0.2, "p95": 0.2, "max": 0.2}
    assert report["moved_gap_nats"] == figures


def test_an_answer_whose_row_was_cut_off_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = runpy.run_path(str(_SCRIPT))
    tokens = [[7, "large", [["a", -0.5], ["b", -1.0]]]]
    text = "".join(
        json.dumps({"mode": mode, "prefetch": prefetch, "prompt": number, "tokens": tokens}) + "\n"
        for mode, prefetch, number in itertools.product(
            names["MODES"], names["PREFETCH"], range(names["ANSWERS"])
        )
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(text[:-9])
    model = make_tiny_model(tmp_path / "tiny", context=8192)
    with Loopback(honest(choose_large_token)) as server:
        arguments = [_SCRIPT.name, server.url, "0.2", str(file), str(model)]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(_SCRIPT), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert report["equal_to_wait"]["wait, prefetch 0"] == names["ANSWERS"]
    kept, written = text.splitlines()[:-1], file.read_text().splitlines()
    assert written[:-1] == kept
    assert json.loads(written[-1])["tokens"] != tokens
