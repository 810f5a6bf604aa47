"""Completion by example: what a reply must not bring into an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.errors import LargeNotContinued
from mlxroute.large.dialects import get_dialect
from mlxroute.large.dialects.chat.framing import HIDDEN, frame
from mlxroute.large.dialects.chat.reply_leaks import find_leak
from mlxroute.large.prompt import Prompt
from mlxroute.types import Message

ASK: Message = {"role": "user", "content": "Why is the sky blue?"}
ANSWER = "The sky is blue because of the scattering of light."
PROMPT = Prompt(messages=(ASK,), answer_start=ANSWER)
BY_EXAMPLE = get_dialect("completion by example")
assert BY_EXAMPLE is not None
DIALECT = BY_EXAMPLE
CONTROLS = ["<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "[INST]"]
CUT_OFF = ["<|im_", "<｜end▁of"]


def read(new: str, *, tokens: list[str] | None = None, finish: str = "length") -> list[bytes]:
    """Return the pieces that a reply adds to the answer so far."""
    part = frame(PROMPT).repeated
    content = [
        {"token": token, "bytes": list(token.encode()), "logprob": -0.5}
        for token in ([part, *tokens] if tokens else [])
    ]
    choice = {
        "message": {"role": "assistant", "content": part + new},
        "finish_reason": finish,
        "logprobs": {"content": content} if content else None,
    }
    completion = DIALECT.completion({"choices": [choice]}, PROMPT)
    return [
        position.token.data or (position.token.text or "").encode()
        for position in completion.positions
    ]


@pytest.mark.parametrize("leak", [*CONTROLS, *(text[:24] for text in HIDDEN)])
def test_a_reply_that_goes_on_with_hidden_text_gives_no_token(leak: str) -> None:
    for new in (leak, f" {leak}", f"\n\n{leak} and more of it"):
        with pytest.raises(LargeNotContinued):
            read(new)
        with pytest.raises(LargeNotContinued):
            read(new, tokens=[new[:3], new[3:]], finish="stop")


@pytest.mark.parametrize("leak", CUT_OFF)
def test_the_beginning_of_a_control_token_gives_no_token(leak: str) -> None:
    for new in (leak, f" {leak}"):
        with pytest.raises(LargeNotContinued):
            read(new)
    assert read(f" Light.{leak}") == [b" Light", b"."]


@pytest.mark.parametrize("leak", [*CONTROLS, *(text[:24] for text in HIDDEN)])
def test_tokens_before_hidden_text_are_kept(leak: str) -> None:
    new = f" It is scattered more.{leak}"
    assert b"".join(read(new)) == b" It is scattered more."
    tokens = [" It", " is", " scattered", " more.", leak]
    assert read(new, tokens=tokens, finish="stop") == [token.encode() for token in tokens[:-1]]
    # A token with text on both sides is left out.
    assert read(new, tokens=[" It", " is", f" scattered more.{leak}"]) == [b" It", b" is"]


def test_hidden_text_that_began_in_the_answer_is_not_gone_on_with() -> None:
    assert find_leak("Then it ended <|im", "_end|> so", HIDDEN) == 0
    assert find_leak("x = 1 Begin you", "r reply with", HIDDEN) == 0


def test_text_that_the_user_brought_may_be_gone_on_after() -> None:
    for text in ["The token <|im_end|> ends a turn", "Then go on from it. Next", "a < b | c"]:
        assert find_leak(text, ", as a rule", HIDDEN) is None
    assert find_leak("In HTML, write ", "<b>bold</b> or <s", HIDDEN) is None


@pytest.mark.parametrize("answer", ["The", f"It is an old question. {ANSWER} is there."])
def test_a_reply_that_repeats_the_plain_request_gives_no_token_of_it(answer: str) -> None:
    request = frame(Prompt(messages=(), answer_start=answer)).messages[-1]["content"]
    for size in (16, len(request)):
        assert find_leak(answer, f"\n\n{request[:size]}", HIDDEN) == 2


def test_words_that_the_instructions_share_with_many_answers_are_no_leak() -> None:
    assert find_leak("They speak the", " same language, and", HIDDEN) is None


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_leak_is_found_inside_the_new_text(answer: str, new: str) -> None:
    leak = find_leak(answer, new, HIDDEN)
    assert leak is None or 0 <= leak < max(1, len(new))
