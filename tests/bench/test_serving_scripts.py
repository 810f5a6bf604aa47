"""The scripts that measure the endpoint and a replica of the large model, with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.soak.planned_requests import choose_large_token
from tests.support.loopback import Loopback
from tests.support.negotiated import honest
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.heavy

_SCRIPTS = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("scripts") / "tiny", context=8192)


def _run(script: str, *arguments: str | Path) -> dict[str, Any]:
    """Return the JSON at the end of a script's output."""
    command = [sys.executable, str(_SCRIPTS / script), *map(str, arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report: dict[str, Any] = json.loads(output[output.index("{") :])
    return report


def test_one_client_and_ask(model: Path) -> None:
    report = _run("endpoint_speed.py", "alone", model, "12", "1")
    assert report["result"]["endpoint_over_ask"] > 0


def test_several_clients(model: Path) -> None:
    report = _run("endpoint_speed.py", "together", model, "4", "1")
    assert report["result"].keys() == {"4 over 1", "8 over 1"}


def test_callers_of_a_server(model: Path) -> None:
    with Loopback(honest(choose_large_token)) as server:
        flags = ("--step-ms", "2", "--callers", "1", "4", "--seconds", "1")
        report = _run("real_replica.py", server.url, "--small", model, *flags)
    assert [row["callers"] for row in report["callers"]] == [1, 4]
    for row in report["callers"]:
        assert row["measured"]["calls"] > 0
        assert row["measured"].keys() - {"calls"} == row["played"].keys() - {"users"}
