"""The shipped demo question with its own pair of real models."""

from __future__ import annotations

import pytest

from mlxroute.cli import main
from tests.conftest import CACHE_DIR


@pytest.mark.heavy
def test_the_shipped_question_comes_out_as_it_was_chosen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--cache-dir", str(CACHE_DIR)]) == 0
    captured = capsys.readouterr()
    assert "the answer became right" in " ".join(captured.err.split())
    assert "CO2" in captured.out
