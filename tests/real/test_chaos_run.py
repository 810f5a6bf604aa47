"""Two hundred answers in a row through a proxy that plays faults, with real weights and a server.

The seed is printed; to repeat a run:  python -m pytest --heavy --chaos-seed N -s FILE
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxroute import LargeModel
from mlxroute.hosting.launcher import LocalServer
from mlxroute.small import SmallModel
from tests.conftest import CACHE_DIR
from tests.real.servers import gguf_file
from tests.support.chaos import Chaos, nothing_left_behind, shorten_pauses
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.network_faults import FAULTS, FaultProxy, RealServer

CHATS = 20
_PAUSE_S = 0.3
_MAX_GROWTH_BYTES = 60_000_000


class MortalServer:
    """A real llama-server that can be killed and started again."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._server = self._launch()
        self.upstream = RealServer(self._server.url)

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        """Kill the server, as the system does where memory runs out; start another at the end."""
        os.kill(self._server.pid, signal.SIGKILL)
        yield
        self._server.close()
        self._server = self._launch()
        self.upstream.move_to(self._server.url)

    def close(self) -> None:
        """End the server."""
        self._server.close()

    def _launch(self) -> LocalServer:
        server = LocalServer.launch(
            gguf_file("smollm2-135m"), cache_dir=CACHE_DIR, log_path=self._log_path
        )
        server.wait_until_ready()
        return server


@pytest.mark.heavy
@needs_llama_cpp
def test_two_hundred_answers_with_faults_at_random_moments(
    noisy_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> None:
    seed = pytestconfig.getoption("chaos_seed")
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    print(f"--chaos-seed {seed}")  # noqa: T201
    shorten_pauses(monkeypatch, _PAUSE_S)
    small = SmallModel.load(str(noisy_path))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with nothing_left_behind(temporary):
        server = MortalServer(tmp_path / "server.log")
        proxy = FaultProxy(server.upstream)
        url = proxy.server.url
        with LargeModel(url, timeout_s=60) as large, LargeModel(url, timeout_s=60) as reference:
            large.connect()
            reference.connect()
            chaos = Chaos(
                small,
                proxy,
                large,
                reference,
                random.Random(seed),
                # By chance, since later turns repeat earlier ones without a doubt.
                router="random",
                threshold=0.6,
                max_tokens=16,
                timeout_s=2.5,
                pause_s=_PAUSE_S,
                accidents={"refused": proxy.server.gone, "killed": server.killed},
            )
            for _ in range(CHATS):
                chaos.chat()
                server.upstream.forget()
        proxy.server.close()
        server.close()
    print(chaos.report())  # noqa: T201
    assert chaos.answers == 10 * CHATS
    assert chaos.disturbed >= 0.5 * chaos.answers
    assert chaos.compared >= 0.3 * chaos.answers
    assert len(proxy.played) >= 0.8 * len(FAULTS)
    resident = chaos.resident_bytes
    assert resident[-1] - resident[len(resident) // 4] < _MAX_GROWTH_BYTES
