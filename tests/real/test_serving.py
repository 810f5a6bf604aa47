"""Answers of a batch with real weights."""

from __future__ import annotations

import math

import pytest

from mlxroute.engine import Options, generate
from mlxroute.routers import make_router
from mlxroute.serving import AnswerRequest, AnswerScheduler
from mlxroute.small import SmallModel
from mlxroute.types import Token
from tests.real.conftest import PROMPTS
from tests.real.exact import near_tie_nats
from tests.support.batch_start import start_batch_of

_TOKENS = 5
# In float32, a batch rounds differently from a single row by less than this.
_NEAR_TIE_NATS = 1e-3


def test_answers_of_a_batch_are_those_written_alone(
    smollm2: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(prompt: str) -> AnswerRequest:
        router = make_router("entropy", threshold=math.inf)
        message = {"role": "user", "content": prompt}
        return AnswerRequest([message], router, Options(max_tokens=_TOKENS))

    prompts = PROMPTS[:3]
    with AnswerScheduler(smollm2, None) as scheduler:
        row_counts = start_batch_of(len(prompts), scheduler, monkeypatch)
        answers = [scheduler.submit(request(prompt)) for prompt in prompts]
        written = [[e for e in answer.events() if isinstance(e, Token)] for answer in answers]
    assert row_counts[0] == len(prompts)
    for prompt, tokens in zip(prompts, written, strict=True):
        router = make_router("entropy", threshold=math.inf)
        small = smollm2.with_own_cache()
        for one, other in zip(
            generate(small, None, prompt, router=router, max_tokens=_TOKENS), tokens, strict=True
        ):
            if one.token_id != other.token_id:
                best, second = one.signals.top_logprobs[:2]
                assert best - second < near_tie_nats(smollm2, at_least=_NEAR_TIE_NATS)
                break
