"""Chat templates: what they accept, what they refuse, and what they may cost."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.errors import UsageError
from mlxroute.small import SmallModel
from mlxroute.tokenizers import template_bounds, template_sandbox
from mlxroute.tokenizers.chat_template import ChatTemplate
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from mlxroute.tokenizers.control_tokens import ControlTokens
from mlxroute.types import Message
from tests.support.tiny import make_tiny_model

_CONTROLS = ControlTokens({"<|im_start|>", "<|im_end|>"})
USER: Message = {"role": "user", "content": "hi"}
SYSTEM: Message = {"role": "system", "content": "be brief"}
_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
_OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"


def render(template: str, *messages: Message) -> str:
    made = ChatTemplate(template, variables={"bos_token": "<s>"}, name="m")
    return made.render(messages or (USER,), _CONTROLS).text


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + _TURNS + _OPEN,
        "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}"
        "{% endfor %}" + _OPEN,
        "{% for m in messages %}{{ {'user': '<user>', 'assistant': '<a>'}[m.role] + m.content }}"
        "{% endfor %}" + _OPEN,
    ],
    ids=["raises", "leaves out", "fails"],
)
def test_a_system_message_that_a_template_does_not_know_begins_the_first_turn(
    template: str,
) -> None:
    assert render(template, SYSTEM, USER) == "<user>be brief\n\nhi<assistant>"
    assert render(template, USER) == "<user>hi<assistant>"


def test_a_template_that_knows_the_system_role_gets_it() -> None:
    expected = "<system>be brief<user>hi<assistant>"
    assert render(_TURNS + _OPEN, SYSTEM, USER) == expected


def test_neighbours_of_one_role_are_joined_where_roles_must_alternate() -> None:
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + _TURNS + _OPEN
    )
    answer: Message = {"role": "assistant", "content": "a"}
    assert render(template, USER, USER, answer, USER) == (
        "<user>hi\n\nhi<assistant>a<user>hi<assistant>"
    )
    assert render(template, SYSTEM, USER) == "<user>be brief\n\nhi<assistant>"
    with pytest.raises(UsageError, match="roles must alternate"):
        render(template, answer, USER)


def test_a_template_that_takes_lists_of_parts_gets_them() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}" + _OPEN
    )
    assert render(template, SYSTEM, USER) == "<system>be brief<user>hi<assistant>"


def test_a_template_that_knows_no_generation_prompt_gets_the_assistants_beginning() -> None:
    turns = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert render(turns) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # Between a question and its answer this template writes a space only.
    llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    assert (
        render(llama + "{% else %} {{ m.content }}{% endif %}{% endfor %}") == "[INST] hi [/INST]"
    )


_FAILING = [
    "{{ messages[0].content + (messages | length) }}",
    "{{ raise_exception('no') }}",
    "{{ missing.field }}",
    "{{ 1 / 0 }}",
    "{{ messages[7].content.strip() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{{ messages[0]['content'] ",
    "{% for %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ strftime_now(3) }}",
    "{{ '%d' % 'x' }}",
    "{{ messages | no_such_filter }}",
    "{{ {}['x'].y }}",
    "{{ '\\ud800' }}",
    "{{ messages[0].content ~ '\\udcff' }}",
]


@pytest.mark.parametrize("template", _FAILING)
def test_a_template_that_fails_is_one_line(template: str) -> None:
    with pytest.raises(UsageError, match="the chat template of m fails: ") as failure:
        render(template)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 400


def _doubled(value: str) -> str:
    """Return a template whose `n.a` and `n.b` have 2**60 parts, all the same object."""
    steps = "".join(f"{{% set n.{x} = {value.replace('@', f'n.{x}')} %}}" for x in "ab")
    start = "{% set n = namespace(a=(), b=()) %}"
    return f"{start}{{% for i in range(60) %}}{steps}{{% endfor %}}"


_COSTLY = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% for i in range(99999) %}" + "y" * 5000 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'y' * 1000 }}{% endfor %}{% endset %}{{ x }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ (99 ** 999) ** 999 }}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x.replace('a', 'aaaaaaaaa') %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x\nx' | indent(1000000000) }}",
    "{{ [1] | tojson(indent=100000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "{% for a in [[1, 1]] recursive %}{% for i in range(99999) %}{{ loop(a) }}{% endfor %}"
    "{% endfor %}",
    "x" * (1 << 21),
    "{{ messages | slice(1000000) | list | length }}",
    "{{ ('a' * 1000000) | wordwrap(1) }}",
    "{{ ('a.com ' * 1000000) | urlize }}",
    "{{ ('<' * 10000000) | striptags }}",
    "{{ ([[1]] * 400000) | sum(start=[]) }}",
    "{{ ('a' * 10000000) | batch(1) | list | length }}",
    "{{ ('ab ' * 10000000).split() | length }}",
    _doubled("[@, @]") + "{{ n.a == n.b }}",
    "{% set n = namespace(a=()) %}{% for i in range(99999) %}{% set n.a = (n.a,) %}{% endfor %}"
    "{{ {n.a: 1} }}",
    "{% set x %}{% for i in range(99999) %}{{ i * (2 ** 61 - 1) }} {% endfor %}{% endset %}"
    "{{ {}.fromkeys(x.split() | map('int') | list) }}",
]


@pytest.mark.parametrize("template", _COSTLY)
def test_a_template_that_never_ends_or_fills_memory_is_stopped(template: str) -> None:
    began_s = time.monotonic()
    with pytest.raises(UsageError, match="the chat template of m fails: ") as failure:
        render(template)
    assert "\n" not in str(failure.value)
    assert time.monotonic() - began_s < 20


@pytest.mark.parametrize(
    "template",
    [
        _doubled("[@, @]") + "{{ n.a is eq n.b }}",
        _doubled("[@, @]") + "{{ n.a ~ '' }}",
        _doubled("(@, @)") + "{{ {n.a: 1} }}",
        _doubled("{'x': @, 'y': @}") + "{{ n.a ~ '' }}",
        _doubled("{'x': @, 'y': @}.values()") + "{{ n.a ~ '' }}",
        _doubled("dict(x=@, y=@)") + "{{ n.a == n.b }}",
        "{% set o = namespace(a=1) %}{% for i in range(60) %}"
        "{% set o.a = [o, o] | map(attribute='a') | list %}{% endfor %}{{ o.a ~ '' }}",
    ],
)
def test_a_template_that_repeats_a_value_in_itself_is_stopped(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit itself is that of the test before."""
    monkeypatch.setattr(template_bounds, "_MAX_ITEMS", 1 << 14)
    with pytest.raises(UsageError, match="fails: it builds a value that is too large"):
        render(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ('x'.encode() * 1000000000) | length }}", "access to attribute 'encode'"),
        ("{{ (7).to_bytes(99999) * 1000000000 }}", "access to attribute 'to_bytes'"),
        ("{{ '{:{}}'.format(1, '>1000000000') }}", "it uses a format that is too wide"),
        ("{{ ['%1000000000d'] | format(1) }}", "it formats what is not a text"),
    ],
)
def test_a_template_cannot_fill_memory_in_one_step(template: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"the chat template of m fails: {reason}"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% set a = [0] * 500000 %}{% set b = [0.0] * 500000 %}{{ "
        + " == ".join(["a", "b"] * 2000)
        + " }}",
        "{% set r = range(99999) | list %}"
        "{{ r | select('in', r | map('string') | list) | list | length }}",
        "{% set n = namespace() %}{% set n.n = n %}{% set a = [n] * 99999 %}"
        "{{ a | map(attribute='n.' * 99999 ~ 'n') | list | length }}",
    ],
)
def test_a_template_that_stays_within_all_other_bounds_is_stopped_by_the_clock(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit itself is that of the next test."""
    monkeypatch.setattr(template_sandbox, "_MAX_SECONDS", 0.1)
    with pytest.raises(UsageError, match="the chat template of m fails: it takes more than 0 s"):
        render(template)


def test_all_runs_of_a_template_for_one_prompt_share_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each look at the clock takes a hundredth of a second.
    clock = SimpleNamespace(monotonic=itertools.count(0, 0.01).__next__)
    monkeypatch.setattr(template_sandbox, "time", clock)
    # One run takes two of the five seconds; it is run for each form of the messages.
    with pytest.raises(UsageError, match="takes more than 5 s"):
        render("{% for i in range(200) %}{% endfor %}", SYSTEM, USER)


def test_values_that_a_template_makes_are_as_usual() -> None:
    template = (
        "{% set a, b = 1, 2 %}{% with c, d = (3, 4) %}{{ c }}{{ d }}{% endwith %}"
        "{% for k, v in [(a, b)] %}{{ k }}{{ v }}{% endfor %}{{ [a] + [b] }}{{ (a, [b], ()) }}"
        "{{ {'k': a, 'l': [b]} }}{{ a < b <= 2 and b not in [a] and b is in [a, b] }}"
        "{{ [a, 3, b] | sort(reverse=true) | join }}{{ '{:>3}{x}'.format(a, x=b) }}"
    )
    expected = "3412[1, 2](1, [2], ()){'k': 1, 'l': [2]}True321  12"
    assert render(template) == expected


def test_the_text_of_a_namespace_has_no_values() -> None:
    assert render(_doubled("namespace(x=@, y=@)") + "{{ [n.a] }}") == "[<Namespace>]"


def test_a_list_of_parts_is_never_printed() -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ raise_exception('no text') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UsageError, match="the chat template of m fails: no text"):
        render(template)


@pytest.mark.parametrize("text", ["/no_think", "Be brief. /no_think"])
def test_a_template_finds_its_switches_in_a_system_message(text: str) -> None:
    template = (
        "{% set s = messages[0].content %}{{ '<quiet>' if '/no_think' in s }}"
        "{{ s.replace('/no_think', '') | trim }}|{{ messages[1].content }}" + _OPEN
    )
    expected = "<quiet>" + text.replace("/no_think", "").strip() + "|hi<assistant>"
    assert render(template, {"role": "system", "content": text}, USER) == expected


@pytest.mark.parametrize("change", ["pprint", "tojson(ensure_ascii=true)", "urlencode", "title"])
def test_no_mark_is_left_by_a_template_that_rewrites_contents(change: str) -> None:
    template = "{% for m in messages %}<{{ m.content | " + change + " }}>{% endfor %}" + _OPEN
    for content in ("hi", "see <|im_end|> there"):
        text = render(template, {"role": "user", "content": content})
        assert not re.search(r"u000f|udb80|%F3%B0|[\U000f0000-\U0010ffff]", text, re.IGNORECASE)


_SYNTAX = (
    "{{ }} {% %} {# #} - if else endif endfor m.role m.content messages [0] x | trim tojson ~ + *"
    " ** 99999999 'a' ( ) endmacro f(9) raise_exception('e') <|im_end|> add_generation_prompt"
    " namespace(y=1)"
)
_WORDS = st.sampled_from([*_SYNTAX.split(), "for m in messages", "set x =", "macro f(n)", "\n"])


@settings(max_examples=100, deadline=None)
@given(template=st.lists(_WORDS, max_size=14).map(" ".join) | st.text(max_size=40))
def test_any_template_gives_a_prompt_or_one_of_our_errors(template: str) -> None:
    try:
        text = render(template, SYSTEM, USER)
    except UsageError as exc:
        text = str(exc).replace("\n", "")
        assert text == str(exc)  # noqa: PT017
    assert isinstance(text, str)


def _folder(path: Path, **changes: Any) -> Path:
    folder = make_tiny_model(path)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    "source",
    [[{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}], 5],
)
def test_named_templates_without_a_default_are_one_line(tmp_path: Path, source: object) -> None:
    folder = _folder(tmp_path / "m", chat_template=source)
    with pytest.raises(UsageError, match=r"the chat templates? of m") as failure:
        ChatTokenizer.load(folder, name="m").encode_conversation([USER])
    assert "\n" not in str(failure.value)


def test_of_named_templates_the_default_is_used(tmp_path: Path) -> None:
    source = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": _TURNS + _OPEN},
    ]
    folder = _folder(tmp_path / "m", chat_template=source)
    prompt = ChatTokenizer.load(folder, name="m").encode_conversation([USER])
    assert prompt.text == "<user>hi<assistant>"


@pytest.mark.parametrize("source", [None, ""])
def test_a_model_without_a_template_is_announced_once(tmp_path: Path, source: object) -> None:
    folder = _folder(tmp_path / "m", chat_template=source)
    notices: list[str] = []

    def notify(line: str) -> None:
        notices.append(line)

    small = SmallModel.load(folder, cache_dir=tmp_path / "cache", notify=notify)
    for _ in range(2):
        assert small.encode_conversation([SYSTEM, USER]).text == "be brief\nhi"
    (notice,) = [line for line in notices if "chat template" in line]
    assert "m has no chat template" in notice
    assert "choose an instruction-tuned model" in notice
