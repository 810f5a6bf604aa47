"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are fitted in a fifth of the usual steps, and less well."""
    monkeypatch.setattr("mlxroute.training.head_shapes._STEPS", 60)
    monkeypatch.setattr("mlxroute.training.head_shapes._EPOCHS", 6)
