"""Control tokens in texts, for servers that read text only."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.tokenizers.content_marks import ContentMarks
from mlxroute.tokenizers.control_tokens import ControlTokens
from mlxroute.types import PromptText

_ANY_FAMILY = (
    "<|eot_id|> <|start_header_id|> <start_of_turn> </s> [/INST] <｜User｜> <think>"
    " <|end▁of▁sentence|> <fim_prefix> [TOOL_CALLS] <|im_end|> <|channel>"
    " [|endofturn|] [|user|] ]~b] ]~!b[ [e~[ <seed:bos> </seed:think> <[begin▁of▁sentence]> <_user>"
    " <reserved_106> <SPECIAL_10> <EOT> [EOT] <sop> <file_sep> [UNUSED_TOKEN_146]"
)
_NAMES = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "<|", "EOS", "< |x", "a b", "|"]


def test_a_space_breaks_up_each_name_and_the_names_are_reported() -> None:
    controls = ControlTokens(["<|im_end|>", "</s>"])
    text = "a<|im_end|>b</s></s> <|im_start|>"
    assert controls.neutralise(text) == (
        "a< |im_end|>b< /s>< /s> <|im_start|>",
        ("<|im_end|>", "</s>"),
    )
    assert controls.neutralise("a < b") == ("a < b", ())


@given(
    st.lists(st.sampled_from([*_NAMES, "<", "im_end|>", "x", " ", "S", "b"]), max_size=12),
    st.sets(st.sampled_from(_NAMES)),
    st.booleans(),
)
def test_no_name_is_left(parts: list[str], names: set[str], any_form: bool) -> None:
    controls = ControlTokens(names, any_form=any_form)
    text, reported = controls.neutralise("".join(parts))
    assert list(controls.find(text)) == []
    assert bool(reported) == (text != "".join(parts))


def test_the_templates_own_markers_stay() -> None:
    controls = ControlTokens(["<|im_end|>"])
    marks = ContentMarks(controls, [])
    content = "x<|im_end|>y"
    prompt = PromptText(f"u{content}<|im_end|>", f"u{marks.mark(content)}<|im_end|>")
    assert controls.neutralise_content(prompt) == ("ux< |im_end|>y<|im_end|>", ("<|im_end|>",))


@pytest.mark.parametrize("text", _ANY_FAMILY.split())
@pytest.mark.parametrize("form", ["mark", "mark_names"])
def test_names_of_a_vocabulary_that_is_not_known_are_content_too(text: str, form: str) -> None:
    marks = ContentMarks(ControlTokens(["<|im_end|>"]), [])
    content = f"a {text} b"
    marked = getattr(marks, form)(content)
    prompt = PromptText(f"u{content}[INST]", f"u{marked}[INST]")
    plain, _ = ControlTokens([], any_form=True).neutralise_content(prompt)
    assert text not in plain.removesuffix("[INST]")
    assert plain.endswith("[INST]")


@pytest.mark.parametrize(
    "text",
    _ANY_FAMILY.split(),
)
def test_control_tokens_of_any_family_are_known_by_their_form(text: str) -> None:
    plain, names = ControlTokens([], any_form=True).neutralise(f"a{text}b")
    assert text not in plain
    assert names == (text,)


@pytest.mark.parametrize(
    "text",
    [
        "[WARNING] disk",
        "[TODO]",
        "a <b>c</b>",
        "List<String>",
        "x <| y |> z",
        "if a<b|c>d:",
        "<a|b>",
        "<xsl:template>",
        "std::vector<xml:node>",
        "Vec<[u8]>",
        "re.match('<[0-9]>')",
        "a[|b|]c",
        "<role>admin</role>",
        "<PRE>",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert ControlTokens([], any_form=True).neutralise(text) == (text, ())


def test_an_answer_keeps_its_marks_of_thinking() -> None:
    controls = ControlTokens(["</think>", "<|im_end|>"], any_form=True, in_answer=True)
    assert controls.neutralise("x</think>y<|im_end|>")[0] == "x</think>y< |im_end|>"


def test_long_texts_take_little_time() -> None:
    controls = ControlTokens([f"<unused{i}>" for i in range(6000)], any_form=True)
    began_s = time.monotonic()
    for text in ("<" * 100_000, "<|" * 50_000, "<|a" * 30_000, "<unused1>" * 10_000):
        controls.neutralise(text)
    assert time.monotonic() - began_s < 7
