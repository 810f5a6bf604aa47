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
_OTHERS = (
    *((mode, prefetch) for mode in (Mode.OVERLAP, Mode.HEDGE) for prefetch in (0, 4)),
    (Mode.AUTO, None),
)


@pytest.mark.heavy
def test_the_modes_write_one_answer_and_leave_the_server_alive(
    smollm2: SmallModel, host: LocalServer
) -> None:
    with _met(smollm2, host) as large:
        waited = _answered(smollm2, large, PROMPTS[0], Mode.WAIT, count=12)
        hedged = _answered(smollm2, large, PROMPTS[0], Mode.HEDGE, count=12, prefetch=2)
    assert hedged.text == waited.text
    assert hedged.escalated == waited.escalated > 2
    assert hedged.prefetch_used > 0


@pytest.mark.heavy
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_an_answer_is_the_same_in_every_mode(
    smollm2: SmallModel, host: LocalServer, prompt: str
) -> None:
    redecoded = decided = 0
    with _met(smollm2, host) as large:
        waited = _answered(smollm2, large, prompt, Mode.WAIT)
        for mode, prefetch in _OTHERS:
            stats = _answered(smollm2, large, prompt, mode, prefetch=prefetch)
            assert stats.text == waited.text, (mode, prefetch)
            assert stats.escalated == waited.escalated
            assert stats.unchecked == 0
            redecoded, decided = redecoded + stats.redecoded, decided + stats.tokens
    print(  # noqa: T201
        f"{waited.escalated} escalated in {waited.tokens} tokens,"
        f" {redecoded} of {decided} decisions decoded again as one row"
    )


def _met(small: SmallModel, host: LocalServer) -> LargeModel:
    large = LargeModel(host.url, timeout_s=120)
    large.connect(thorough=False)
    large.meet(small.vocabulary)
    return large


def _answered(
    small: SmallModel,
    large: LargeModel,
    prompt: str,
    mode: Mode,
    *,
    count: int = 96,
    prefetch: int | None = 0,
) -> RunStats:
    answer = generate(
        small,
        large,
        prompt,
        # At 96 tokens some 7 % of the positions.
        router=EntropyRouter(1.5 if count < 96 else 3.6),
        max_tokens=count,
        timeout_s=120.0,
        mode=mode,
        prefetch=prefetch,
    )
    for token in answer:
        large_token = token.escalation and token.escalation.large
        if large_token and len(large_token.top) > 1:
            margin = large_token.top[0][1] - large_token.top[1][1]
            if margin < _NEAR_TIE_NATS:
                print(f"a near tie at {token.index} of {prompt!r}")  # noqa: T201
    return answer.stats()
