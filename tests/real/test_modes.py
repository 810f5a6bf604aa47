"""The speed modes with real weights and a real `mlx_lm.server`."""

from __future__ import annotations

import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.large.launcher import LocalServer
from mlxroute.small import SmallModel
from mlxroute.types import Mode, RunStats
from tests.real.conftest import PROMPTS

# The prompt's last token computed alone or with others rounds differently in the server.
_NEAR_TIE_NATS = 0.01


def test_the_modes_write_one_answer_and_leave_the_server_alive(
    smollm2: SmallModel, host: LocalServer
) -> None:
    with LargeModel(host.url, timeout_s=120) as large:
        large.connect(thorough=False)
        large.meet(smollm2.vocabulary)
        waited = _answered(smollm2, large, Mode.WAIT, prefetch=0)
        ahead = _answered(smollm2, large, Mode.WAIT, prefetch=4)
        overlapped = _answered(smollm2, large, Mode.OVERLAP, prefetch=4)
        alone = _answered(smollm2, large, Mode.OVERLAP, prefetch=0)
    for stats in (ahead, overlapped, alone):
        assert stats.text == waited.text
        assert stats.escalated == waited.escalated > 3
        assert stats.unchecked == waited.unchecked == 0
    assert ahead.prefetch_used > 0
    assert ahead.calls < waited.calls


def _answered(small: SmallModel, large: LargeModel, mode: Mode, *, prefetch: int) -> RunStats:
    answer = generate(
        small,
        large,
        PROMPTS[0],
        router=EntropyRouter(1.5),
        max_tokens=16,
        timeout_s=120.0,
        mode=mode,
        prefetch=prefetch,
    )
    tokens = list(answer)
    for token in tokens:
        large_token = token.escalation and token.escalation.large
        if large_token and len(large_token.top) > 1:
            margin = large_token.top[0][1] - large_token.top[1][1]
            if margin < _NEAR_TIE_NATS:
                pytest.fail(f"choose another prompt: a near tie at {token.index}")
    return answer.stats()
