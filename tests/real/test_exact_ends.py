"""The extremes are exact: never escalating gives mlx_lm's answer, always the large model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxroute import EntropyRouter, LargeModel, generate
from mlxroute.hosting.launcher import LocalServer
from mlxroute.small import SmallModel
from mlxroute.types import Source
from tests.conftest import CACHE_DIR
from tests.real.conftest import PROMPTS, serve
from tests.real.exact import first_difference, mlx_lm_greedy, mlx_lm_server_greedy, near_tie_nats


def check_never_escalating(small: SmallModel, prompts: list[str], count: int) -> None:
    for prompt in prompts:
        answer = generate(small, None, prompt, router=EntropyRouter(math.inf), max_tokens=count)
        ids = [token.token_id for token in answer]
        assert ids == mlx_lm_greedy(small, prompt, count), prompt
        assert "�" not in answer.stats().text


def check_always_escalating(small: SmallModel, url: str, prompts: list[str], count: int) -> None:
    with LargeModel(url, timeout_s=120) as large:
        for prompt in prompts:
            text = small.encode_conversation([{"role": "user", "content": prompt}]).text
            expected = mlx_lm_server_greedy(url, text, count)
            answer = generate(
                small,
                large,
                prompt,
                router=EntropyRouter(-math.inf),
                max_tokens=count,
                timeout_s=120,
                strict=True,
            )
            tokens = list(answer)
            assert {token.source for token in tokens} == {Source.LARGE}
            difference = first_difference(tokens, expected)
            if difference is None:
                assert len(tokens) == len(expected), prompt
                continue
            index, gap = difference
            print(f"near-tie at token {index} of {prompt!r}: gap {gap:.5f} nats")  # noqa: T201
            assert gap < near_tie_nats(small), (prompt, index, gap)


def test_smollm2_alone_writes_what_mlx_lm_writes(smollm2: SmallModel) -> None:
    check_never_escalating(smollm2, [PROMPTS[i] for i in (1, 16)], 6)


# The default run checks the same server in test_servers.
@pytest.mark.heavy
def test_always_asking_a_real_server_gives_the_servers_own_answer(
    smollm2: SmallModel, host: LocalServer
) -> None:
    check_always_escalating(smollm2, host.url, [PROMPTS[i] for i in (0, 6)], 10)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_twenty_prompts_alone_equal_mlx_lm(
    load_small: Callable[[str], SmallModel], name: str
) -> None:
    check_never_escalating(load_small(name), PROMPTS, 64)


@pytest.mark.heavy
def test_always_asking_the_larger_qwen_gives_its_own_answer(
    load_small: Callable[[str], SmallModel], tmp_path: Path
) -> None:
    small = load_small("qwen2.5-coder-0.5b")
    path = _fetch_model("qwen2.5-coder-1.5b")
    with serve(path, tmp_path / "log") as server:
        check_always_escalating(small, server.url, PROMPTS[:10], 32)


def _fetch_model(name: str) -> Path:
    from mlxroute.catalog import Catalog
    from mlxroute.types import no_notice, no_progress
    from mlxroute.weights import resolve

    return resolve(
        name,
        catalog=Catalog.load(),
        cache_dir=CACHE_DIR,
        offline=False,
        progress=no_progress,
        notify=no_notice,
    ).path
