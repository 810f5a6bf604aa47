"""The speed modes with real weights and a real `mlx_lm.server`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.bench.delayed_server import DelayedServer
from mlxroute.hosting.launcher import LocalServer
from mlxroute.small import SmallModel
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.types import Mode, RunStats, Token
from tests.real.conftest import PROMPTS
from tests.real.exact import near_tie_nats

# No test waits this long.
_FOREVER_S = 3600.0
_OTHERS = (
    *((mode, prefetch) for mode in (Mode.OVERLAP, Mode.HEDGE) for prefetch in (0, 4)),
    (Mode.AUTO, None),
)


@pytest.mark.heavy
def test_the_modes_write_one_answer_and_leave_the_server_alive(
    smollm2: SmallModel, host: LocalServer
) -> None:
    with _connect(smollm2, host.url) as large:
        waited = _stats_of(smollm2, large, PROMPTS[0], Mode.WAIT, count=12)
        hedged = _stats_of(smollm2, large, PROMPTS[0], Mode.HEDGE, count=12, prefetch=2)
    assert hedged.text == waited.text
    assert hedged.escalated == waited.escalated > 2
    assert hedged.prefetch_used > 0


@pytest.mark.heavy
@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_an_answer_is_the_same_in_every_mode(
    smollm2: SmallModel, noisy_host: LocalServer, prompt: str
) -> None:
    redecoded = decided = 0
    with _connect(smollm2, noisy_host.url) as large:
        waited, expected = _answer(smollm2, large, prompt, Mode.WAIT)
        for mode, prefetch in _OTHERS:
            stats, tokens = _answer(smollm2, large, prompt, mode, prefetch=prefetch)
            redecoded, decided = redecoded + stats.redecoded, decided + stats.tokens
            assert stats.unchecked == 0
            if not _server_contradicts_itself(expected, tokens, near_tie_nats(smollm2)):
                assert stats.text == waited.text, (mode, prefetch)
                assert stats.escalated == waited.escalated
    print(  # noqa: T201
        f"{waited.escalated} escalated in {waited.tokens} tokens, {waited.agreed} agreed,"
        f" {redecoded} of {decided} decisions decoded again as one row"
    )


@pytest.mark.heavy
@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP, Mode.HEDGE])
def test_replies_out_of_order_leave_the_answer_as_it_is(
    smollm2: SmallModel, noisy_host: LocalServer, tmp_path: Path, mode: Mode
) -> None:
    with (
        DelayedServer(noisy_host.url, record=tmp_path / "replies.jsonl") as server,
        _connect(smollm2, server.url) as large,
    ):
        waited = _stats_of(smollm2, large, PROMPTS[0], Mode.WAIT, count=48)
        server.delay, server.delay_s = (lambda dice: dice.choice([0.1, 1.0, 4.0])), 0.5
        for prefetch in (0, 4):
            late = _stats_of(smollm2, large, PROMPTS[0], mode, count=48, prefetch=prefetch)
            assert late.text == waited.text
            assert late.escalated == waited.escalated > waited.agreed


@pytest.mark.heavy
@pytest.mark.parametrize("seconds", [30.0, math.inf], ids=["after 30 s", "never"])
@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP, Mode.HEDGE])
def test_a_server_that_is_late_costs_one_timeout_and_no_token(
    smollm2: SmallModel, noisy_host: LocalServer, tmp_path: Path, mode: Mode, seconds: float
) -> None:
    with (
        DelayedServer(noisy_host.url, record=tmp_path / "replies.jsonl") as server,
        _connect(smollm2, server.url) as large,
    ):
        alone = _stats_of(smollm2, None, PROMPTS[0], mode, count=48)
        # Delays the third call and all later ones.
        calls = itertools.count(1)
        server.delay = lambda dice: 0.001 if next(calls) < 3 else 1.0
        server.delay_s = min(seconds, _FOREVER_S)
        late = _stats_of(smollm2, large, PROMPTS[0], mode, count=48, timeout_s=2.0)
    assert late.fallbacks > 0
    assert late.escalated < 3
    # The stall time includes the two calls that were answered.
    assert late.stall_s < 2.0 + 5.0
    assert late.tokens == alone.tokens


def _connect(small: SmallModel, url: str) -> LargeModel:
    # The model's files are on this machine, so its tokenizer is available.
    tokenizer = ChatTokenizer(small.tokenizer, name="own")
    large = LargeModel(url, timeout_s=120, find_tokenizer=lambda name: tokenizer)
    large.connect(thorough=False)
    large.pair_vocabulary(small.vocabulary)
    return large


def _stats_of(*args: Any, **options: Any) -> RunStats:
    return _answer(*args, **options)[0]


def _answer(
    small: SmallModel,
    large: LargeModel | None,
    prompt: str,
    mode: Mode,
    *,
    count: int = 96,
    prefetch: int | None = 0,
    timeout_s: float = 120.0,
) -> tuple[RunStats, list[Token]]:
    """Return an answer's figures and its committed tokens."""
    answer = generate(
        small,
        large,
        prompt,
        # In an answer of 96 tokens, 3.6 nats escalate about 7 % of the positions.
        router=EntropyRouter(1.5 if count < 96 else 3.6),
        max_tokens=count,
        timeout_s=timeout_s,
        mode=mode,
        prefetch=prefetch,
    )
    committed = list(answer)
    stats = answer.stats()
    assert "".join(token.text for token in committed) == stats.text
    return stats, committed


def _server_contradicts_itself(
    expected: Sequence[Token], tokens: Sequence[Token], near_tie: float
) -> bool:
    """Return whether the answers first differ where the server chose differently at a near tie.

    It rounds a prompt's last token differently alone and together with others.
    """
    for token, other in zip(tokens, expected, strict=False):
        if token.token_id != other.token_id:
            escalations = [token.escalation, other.escalation]
            tops = [call.large.top for call in escalations if call is not None and call.large]
            near = [top[0][1] - top[1][1] < near_tie for top in tops if len(top) > 1]
            print(f"the server contradicts itself at {token.index}: {tops}")  # noqa: T201
            return len(near) == 2 and any(near)
    return False
