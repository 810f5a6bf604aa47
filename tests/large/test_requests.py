"""Each dialect's request, key by key."""

from __future__ import annotations

from typing import Any

import pytest

from mlxroute.large.dialects import LADDER, Dialect, RequestOptions, dialect_named, with_ids
from mlxroute.large.prompt import Prompt, PromptForm
from tests.support.prompt_forms import IDS, QUESTION, prompt_for

BEGUN: dict[str, Any] = {"role": "assistant", "content": "He"}
SAMPLING = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}
LIMITS = {"max_tokens": 2, "temperature": 0}
LOGPROBS = {"logprobs": True, "top_logprobs": 7}
FLAGS = {"continue_final_message": True, "add_generation_prompt": False}

REQUESTS: dict[str, dict[str, Any]] = {
    "llama-server completion": {
        "prompt": [5, 6],
        "n_predict": 2,
        "n_probs": 7,
        "temperature": 0,
        "samplers": ["temperature"],
        "cache_prompt": True,
        "return_tokens": True,
        "response_fields": [
            *("content", "tokens", "stop_type", "completion_probabilities"),
            *("tokens_evaluated", "tokens_predicted", "timings", "truncated"),
        ],
    },
    "vLLM completions": {
        "prompt": [5, 6],
        **LIMITS,
        **SAMPLING,
        "logprobs": 7,
        "return_token_ids": True,
        "return_tokens_as_token_ids": False,
        "model": "m",
    },
    "SGLang generate": {
        "input_ids": [5, 6],
        "sampling_params": {"max_new_tokens": 2, "temperature": 0, **SAMPLING},
        "return_logprob": True,
        "top_logprobs_num": 7,
        "return_text_in_logprobs": True,
    },
    "TGI generate": {
        "inputs": "He",
        "parameters": {"max_new_tokens": 2, "do_sample": False, "details": True, "top_n_tokens": 5},
    },
    "mlx_lm completions": {"prompt": "He", **LIMITS, **LOGPROBS, "model": "m"},
    "Ollama generate": {
        "prompt": "He",
        "raw": True,
        "stream": False,
        "truncate": False,
        **LOGPROBS,
        "options": {"num_predict": 2, "temperature": 0, "repeat_penalty": 1.0},
        "model": "m",
    },
    "OpenAI completions": {"prompt": "He", **LIMITS, "logprobs": 7, "model": "m"},
    "OpenAI completions, text only": {"prompt": "He", **LIMITS, "model": "m"},
    "chat continuation (flags)": {
        "messages": [QUESTION, BEGUN],
        **LIMITS,
        **LOGPROBS,
        **FLAGS,
        "chat_template_kwargs": {"enable_thinking": False},
        "model": "m",
    },
    "chat continuation (prefix)": {
        "messages": [QUESTION, BEGUN | {"prefix": True}],
        **LIMITS,
        **LOGPROBS,
        "model": "m",
    },
    "chat continuation (trailing turn, echoing)": {
        "messages": [QUESTION, BEGUN],
        **LIMITS,
        **LOGPROBS,
        "model": "m",
    },
    "chat continuation (trailing turn)": {
        "messages": [QUESTION, BEGUN],
        **LIMITS,
        **LOGPROBS,
        "model": "m",
    },
    "chat continuation (prefix, echoing, text only)": {
        "messages": [QUESTION, BEGUN | {"prefix": True}],
        **LIMITS,
        "model": "m",
    },
    "chat continuation (trailing turn, text only)": {
        "messages": [QUESTION, BEGUN],
        **LIMITS,
        "model": "m",
    },
}
PATHS = {
    "llama-server completion": "/completion",
    "SGLang generate": "/generate",
    "TGI generate": "/generate",
    "Ollama generate": "/api/generate",
}


@pytest.mark.parametrize("asked", LADDER, ids=lambda each: each.name)
def test_a_request_has_these_keys_and_no_others(asked: Dialect) -> None:
    request = asked.request(
        prompt_for(asked), RequestOptions(max_tokens=2, top_logprobs=7, model="m")
    )
    assert request == REQUESTS[asked.name]
    path = PATHS.get(asked.name)
    openai = "/chat/completions" if asked.form is PromptForm.CHAT else "/completions"
    assert (asked.path, asked.at_root) == (path or openai, path is not None)


@pytest.mark.parametrize("asked", LADDER, ids=lambda each: each.name)
def test_without_a_model_none_is_named(asked: Dialect) -> None:
    request = asked.request(
        prompt_for(asked), RequestOptions(max_tokens=2, top_logprobs=7, model=None)
    )
    expected = {k: v for k, v in REQUESTS[asked.name].items() if k != "model"}
    assert request == expected


def test_a_turn_of_which_nothing_is_written_is_not_begun() -> None:
    for asked in LADDER:
        if asked.form is PromptForm.CHAT:
            request = asked.request(Prompt(messages=(QUESTION,)), RequestOptions(2, 7, "m"))
            assert request["messages"] == [QUESTION]
            assert not set(request) & set(FLAGS)


def test_dialects_have_names_of_their_own_and_come_best_rung_first() -> None:
    names = [each.name for each in LADDER]
    assert len(set(names)) == len(names)
    rungs = [each.rung for each in LADDER]
    assert rungs == sorted(rungs)
    assert [dialect_named(name) for name in names] == list(LADDER)
    assert dialect_named("telepathy") is None
    ids = {each.name for each in LADDER if each.form is PromptForm.IDS}
    assert ids == {each.name for each in LADDER if each.rung == 1}


def test_only_vllm_has_a_form_for_vocabularies_that_are_known() -> None:
    for each in LADDER:
        exact = with_ids(each)
        if each.name == "vLLM completions":
            request = exact.request(IDS, RequestOptions(2, 7, "m"))
            assert request == REQUESTS[each.name] | {"return_tokens_as_token_ids": True}
        else:
            assert exact is each
