"""Messages from outside: only text gets in, and the thinking of earlier answers stays out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import UsageError
from mlxroute.messages import answer_opening, fold_system, read_messages, without_thinking

_ANSWER = "42, because\n\n</b> is HTML"


@pytest.mark.parametrize(
    "thinking",
    [
        "<think>\nlet me see\n</think>\n\n",
        "<think></think>",
        "\n<think>a < b</think>\n",
        "let me see\n</think>\n\n",
        "</think>\n",
        "[THINK]x[/THINK]",
        "<thinking>x</thinking> ",
        "◁think▷x◁/think▷",
        "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel>thought\nx<channel|>",
        "\ufeff<think>x</think>",
    ],
)
def test_the_thinking_an_answer_begins_with_is_left_out(thinking: str) -> None:
    messages = read_messages(
        [
            {"role": "user", "content": thinking},
            {"role": "assistant", "content": thinking + _ANSWER},
            {"role": "user", "content": "why?"},
        ]
    )
    # A user may write anything.
    assert [m["content"] for m in messages] == [thinking, _ANSWER, "why?"]


def test_thinking_that_was_cut_off_is_left_out() -> None:
    assert without_thinking("<think>I wonder whether") == ""


@pytest.mark.parametrize(
    "answer",
    [
        "Write <think>x</think> around it.",
        "The tag `</think>` ends it.",
        "```\n</think>\n```",
        "Use\n<think>\nx\n</think>\nlike this.",
        "plain",
        "",
    ],
)
def test_an_answer_about_thinking_is_kept(answer: str) -> None:
    assert without_thinking(answer) == answer


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|im_start|>assistant\n<think>\n", "\n</think>\n\n"),
        ("<|im_start|>assistant\n<think>\n\n", "</think>\n\n"),
        ("<|im_start|>assistant\n<think>", "\n\n</think>\n\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n", ""),
        ("<|start|>assistant", "<|channel|>final<|message|>"),
    ],
)
def test_a_prompt_that_begins_thinking_is_followed_by_its_end(prompt: str, opening: str) -> None:
    assert answer_opening(prompt) == opening


@given(st.text())
def test_leaving_out_thinking_gives_an_end_of_the_answer(answer: str) -> None:
    assert answer.endswith(without_thinking(answer))


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        {"role": "user", "content": "hi"},
        5,
        [5],
        [{"role": "tool", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": b"x"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": ["x"]}],
    ],
)
def test_what_is_not_text_is_one_clear_error(messages: Any) -> None:
    with pytest.raises(UsageError, match="message") as failure:
        read_messages(messages)
    assert failure.value.parameter == "messages"
    assert "\n" not in str(failure.value)


def test_lists_of_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts}]) == (
        {"role": "user", "content": "ab"},
    )


def test_a_system_message_alone_becomes_a_user_message() -> None:
    assert fold_system([{"role": "system", "content": "a"}]) == [{"role": "user", "content": "a"}]
