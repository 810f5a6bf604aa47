"""Twenty answers in a row with faults at random moments; `tests/real` has the same at length.

Other faults:  python -m pytest --chaos-seed N -s FILE
"""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from mlxroute import LargeModel
from mlxroute.types import Mode
from tests.support.chaos import Chaos, nothing_left_behind, shorten_pauses
from tests.support.connected_clients import legacy
from tests.support.hosted_servers import PROVIDERS, HostedServer
from tests.support.known_answers import write_known
from tests.support.loopback import Reply
from tests.support.negotiated import honest
from tests.support.network_faults import FaultProxy
from tests.support.scripted_models import ScriptedSmall

SEED = 19


@pytest.fixture
def rng(pytestconfig: pytest.Config) -> random.Random:
    seed = pytestconfig.getoption("chaos_seed")
    return random.Random(SEED if seed is None else seed)


def test_twenty_answers_with_faults_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_retry_pauses: None, rng: random.Random
) -> None:
    shorten_pauses(monkeypatch, 0.05)
    with nothing_left_behind(tmp_path):
        proxy = FaultProxy(honest(lambda request: Reply.of(legacy("L"))))
        url = proxy.server.url
        with (
            closing(proxy.server),
            LargeModel(url, timeout_s=60) as large,
            LargeModel(url) as reference,
        ):
            large.connect()
            chaos = Chaos(
                ScriptedSmall(
                    b"the small model says this", entropies=dict.fromkeys((2, 5, 9), 2.0)
                ),
                proxy,
                large,
                reference,
                rng,
                threshold=1.0,
                calls=3,
                max_tokens=24,
                timeout_s=0.8,
                pause_s=0.05,
                modes=(Mode.WAIT, Mode.OVERLAP),
                accidents={"refused": proxy.server.gone},
            )
            for _ in range(2):
                chaos.chat()
    print(chaos.report())  # noqa: T201
    assert chaos.answers == 20
    assert chaos.disturbed >= 8
    assert chaos.compared >= 4


def test_twenty_answers_by_example_with_faults_at_random_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_retry_pauses: None, rng: random.Random
) -> None:
    """The same on a server that only chats; its tokens are words."""
    shorten_pauses(monkeypatch, 0.05)
    with nothing_left_behind(tmp_path):
        server = HostedServer(PROVIDERS["OpenAI GPT-4.1"], write_known)
        proxy = FaultProxy(server)
        url = proxy.server.url
        with (
            closing(proxy.server),
            LargeModel(url, timeout_s=60) as large,
            LargeModel(url) as reference,
        ):
            large.connect()
            assert large.is_approximate
            chaos = Chaos(
                ScriptedSmall(
                    b"the small model says this", entropies=dict.fromkeys((2, 5, 9), 2.0)
                ),
                proxy,
                large,
                reference,
                rng,
                threshold=1.0,
                # A word may take up the other places.
                calls=2,
                max_tokens=24,
                timeout_s=0.8,
                pause_s=0.05,
                modes=(Mode.WAIT, Mode.OVERLAP),
                accidents={"refused": proxy.server.gone},
            )
            for _ in range(2):
                chaos.chat()
    print(chaos.report())  # noqa: T201
    assert chaos.answers == 20
    assert len(proxy.played) >= 10
    assert chaos.compared >= 3
