"""Never-send patterns: a context that matches stays on this machine."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.engine import Answer, Options
from mlxroute.engine.escalation import never_send
from mlxroute.engine.escalation.never_send import NeverSend, find_match
from mlxroute.routers import EntropyRouter
from mlxroute.types import EncodedPrompt, Message, Prices, Source, Token
from tests.support.scripted_models import FakeClock, ScriptedLarge, ScriptedSmall

USER: Message = {"role": "user", "content": "hi"}


def run(
    *patterns: str,
    small: ScriptedSmall,
    large: ScriptedLarge,
    threshold: float = -math.inf,
    messages: Sequence[Message] = (USER,),
) -> tuple[list[Token], Answer]:
    answer = Answer(
        small,
        large,
        messages,
        router=EntropyRouter(threshold),
        options=Options(
            strict=True,
            never_send=tuple(map(re.compile, patterns)),
            prices=Prices(input=1e6, cached_input=0.0, output=0.0),
        ),
        clock=FakeClock(),
    )
    return list(answer), answer


def test_a_match_in_the_prompt_keeps_the_whole_answer_local() -> None:
    large = ScriptedLarge([b"X"])
    tokens, answer = run("absent", "h[i]", small=ScriptedSmall(b"hello"), large=large)
    assert large.contexts == []
    assert "".join(token.text for token in tokens) == "hello"
    assert not any(token.checked for token in tokens)
    failures = {token.escalation.failure for token in tokens if token.escalation}
    assert failures == {"withheld: never-send pattern 2"}
    stats = answer.stats()
    # Six tokens with the end: nothing failed, nothing was sent, nothing was waited for.
    assert (stats.withheld, stats.unchecked, stats.fallbacks, stats.escalated) == (6, 6, 0, 0)
    assert (stats.requests, stats.uploaded_bytes, stats.stall_s) == (0, 0, 0.0)


def test_a_match_in_the_answer_keeps_what_follows_local() -> None:
    large = ScriptedLarge([b"s", b"e", b"c", b"X"])
    tokens, answer = run("sec", small=ScriptedSmall(b"abcdef"), large=large)
    assert "".join(token.text for token in tokens) == "secdef"
    assert [token.source for token in tokens[:4]] == [Source.LARGE] * 3 + [Source.SMALL]
    assert answer.stats().withheld == 4


def test_what_follows_a_match_at_the_end_of_a_context_stays_local_too() -> None:
    large = ScriptedLarge([b"s", b"e", b"c", b"X"])
    tokens, answer = run(r"sec\b", small=ScriptedSmall(b"abcdef"), large=large)
    assert "".join(token.text for token in tokens) == "secdef"
    assert len(large.contexts) == 3
    assert answer.stats().withheld == 4


def test_a_match_may_begin_in_the_prompt_and_end_in_the_answer() -> None:
    large = ScriptedLarge([b"X"])
    run(">X", small=ScriptedSmall(b"abc"), large=large)
    assert len(large.contexts) == 1


def test_a_match_in_a_message_counts_though_the_template_drops_it() -> None:
    class Forgetful(ScriptedSmall):
        def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
            return super().encode_conversation(messages[-1:])

    large = ScriptedLarge([b"X"])
    system: Message = {"role": "system", "content": "project Zebra"}
    run("Zebra", small=Forgetful(b"abc"), large=large, messages=[system, USER])
    assert large.contexts == []


def test_without_a_match_every_escalated_position_is_asked() -> None:
    large = ScriptedLarge([b"X"])
    _, answer = run("Zebra", small=ScriptedSmall(b"abc", entropies={1: 2.0}), large=large,
                    threshold=1.0)  # fmt: skip
    assert (len(large.contexts), answer.stats().withheld) == (1, 0)
    assert answer.stats().requests == 1
    # Two of ten prompt tokens were not cached.
    assert answer.stats().cost_estimate == pytest.approx(2.0)


def test_an_answer_counts_only_its_own_uploads() -> None:
    large = ScriptedLarge([b"X"])
    for _ in range(2):
        _, answer = run(small=ScriptedSmall(b"a", entropies={0: 2.0}), large=large, threshold=1.0)
        stats = answer.stats()
        assert (stats.requests, stats.uploaded_bytes, stats.uploaded_tokens) == (1, 100, 10)
        assert (stats.large_cached_tokens, stats.large_completion_tokens) == (8, 1)
    assert large.uploads.requests == 2


_PIECES = st.sampled_from(
    [
        *("a", "b", ".", "[ab]", "a?", "(?:ab|b)", "(?P<n>ab?)", "b{2}", "(a{1,2}b){0,2}", "b{,2}"),
        *(
            "a*",
            "b+",
            "b.*b",
            "a{2,}",
            r"(a)\1",
            r"\s",
            "(?i:A)",
            "(?=b)",
            "(?=.*a)",
            "(?!b)",
            "(?<=a)",
        ),
        *(r"\b", r"\B", "^", "$", r"\Z", r"\A", "(?<!b)", "(?s:.)", "(?m:^)", "(?m:$)"),
    ]
)
_TAKEN_BACK = st.just(0) | st.just(0) | st.integers(1, 12)


def _pattern(pieces: list[str]) -> re.Pattern[str] | None:
    try:
        return re.compile("".join(pieces))
    except re.error:  # Two groups of one name, or a reference to another group.
        return None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(_PIECES, min_size=1, max_size=5).map(_pattern).filter(bool),
    st.lists(st.tuples(_TAKEN_BACK, st.text("aab \n", max_size=6)), max_size=8),
)
def test_what_is_not_searched_again_could_not_have_matched(
    pattern: re.Pattern[str], steps: list[tuple[int, str]]
) -> None:
    # Each step takes some text back, as a rollback does, and adds some. An empty text is left out,
    # because `re` and `regex` disagree whether `\B` matches it.
    guard = NeverSend([pattern], [])
    context = "."
    for taken, added in steps:
        context = context[: max(1, len(context) - taken)] + added
        assert guard.match(context) == (1 if pattern.search(context) else None)


@pytest.mark.parametrize(
    "pattern",
    [
        "BEGIN.*END",
        "BEGIN(?=.*END)",
        "(?<!x)B[^!]+END",
        r"(B)EGIN.{0,}END",
        "BEGIN(?:.{4}){125}END",
    ],
)
def test_a_match_may_be_long(pattern: str) -> None:
    guard = NeverSend([re.compile(pattern)], [])
    context = "... BEGIN" + "y" * 500
    assert guard.match(context) is None
    assert guard.match(context + "EN") is None
    assert guard.match(context + "END") == 1


def test_a_long_prompt_is_not_searched_again_for_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[int] = []

    def record(pattern: object, text: str, start: int) -> bool:
        starts.append(start)
        return False

    monkeypatch.setattr(never_send, "_search", record)
    guard = NeverSend([re.compile("token-[0-9]{3}")], [])
    prompt = "x" * 10_000
    for length in range(3):
        assert guard.match(prompt + "y" * length) is None
    assert starts[0] == 0
    assert all(start > 9_000 for start in starts[1:])


_UNICODE = [
    ("O'Brien", "O\u2019Brien"),
    ("O\u2019Brien", "O'Brien"),
    ("(?i)o\u2019brien", "O'BRIEN"),
    ("project-x", "project\u2011x"),
    (r"\d{3}-\d{4}", "555\u20124567"),
    ('"x"', "\u201cx\u201d"),
    ("Zo\u00eb", "Zoe\u0308"),
    ("Zoe\u0308", "Zo\u00eb"),
    (r"Zoe\u0308", "Zo\u00eb"),
    (r"Zo\u00eb", "Zoe\u0308"),
    (r"\bZo[e\u00eb]\b", "Zoe\u0308 said"),
    ("secret", "sec\u200bret"),
    ("secret", "s\u00adecret"),
    ("secret", "sec\u202eret\u2066"),
    ("secret", "\ufeffsec\u200d\u2060ret"),
    ("secret", "sec\ufe0fret"),
    ("secret", "sec\U000e0041ret"),
    ("secret", "sec\x00ret"),
    ("sec\u00adret", "secret"),
    ("secret", "\uff53\uff45\uff43\uff52\uff45\uff54"),
    ("\uff53ecret", "secret"),
    (r"\d{4}-\d{4}", "\uff11\uff12\uff13\uff14\uff0d\uff15\uff16\uff17\uff18"),
    ("John Smith", "John\u00a0Smith"),
    ("\uff08x\uff09", "(x)"),
    ("file", "\ufb01le"),
    ("(?i)stra\u00dfe", "STRASSE"),
    ("(?i)STRASSE", "stra\u00dfe"),
    ("(?i:stra\u00dfe) 1", "STRASSE 1"),
    (r"(?i)\bzo\u00eb\S", "ZOE\u0308!"),
    ("\u1e69", "s\u0307\u0323"),
    (r"\N{LATIN SMALL LETTER E WITH DIAERESIS}", "e\u0308"),
]


@pytest.mark.parametrize(("pattern", "text"), _UNICODE)
def test_a_pattern_matches_text_that_looks_the_same(pattern: str, text: str) -> None:
    for texts, context in (([text], ""), ([], f"a {text} b")):
        assert NeverSend([re.compile(pattern)], texts).match(context) == 1


@pytest.mark.parametrize(("pattern", "text"), _UNICODE)
def test_text_that_looks_the_same_may_arrive_in_parts(pattern: str, text: str) -> None:
    guard = NeverSend([re.compile(pattern)], [])
    context = "x" * 400 + " "
    numbers = [guard.match(context + text[:length]) for length in range(len(text) + 1)]
    assert numbers[0] is None
    assert guard.match(f"{context}{text} ") == 1


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("stra\u00dfe", "STRASSE"),
        ("Zoe", "Zo\u00eb"),
        ("a\u200b", "b"),
        ("\u200b", "b"),
        ("\u200b|x", "b"),
        ("[\u200b]", "b"),
        ("\uff0e", "b"),
    ],
)
def test_a_pattern_does_not_match_other_text(pattern: str, text: str) -> None:
    assert NeverSend([re.compile(pattern)], [text]).match(text) is None


def test_a_pattern_that_takes_too_long_counts_as_a_match() -> None:
    guard = NeverSend([re.compile("absent"), re.compile("^(a|aa)+$")], [])
    began_s = time.monotonic()
    assert guard.match("a" * 200 + "b") == 2
    assert time.monotonic() - began_s < 20


@settings(max_examples=200, deadline=None)
@given(pattern=st.text(max_size=12), text=st.text(max_size=20))
def test_any_pattern_that_matches_a_text_keeps_it(pattern: str, text: str) -> None:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError):
        return
    number = NeverSend([compiled], [text]).match(text)
    if text and compiled.search(text):
        assert number == 1


def test_a_pattern_of_whole_texts_is_searched_in_these_texts_alone() -> None:
    """An empty text that nobody wrote matches `^$`, and would keep every conversation here."""
    patterns = [re.compile("^$"), re.compile("secret")]
    assert find_match(patterns, ["hello", "a secret"]) == 2
    assert find_match(patterns, ["hello"]) is None
    assert find_match(patterns, ["hello", ""]) == 1
