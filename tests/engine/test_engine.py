"""The decode loop, on scripted models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.engine import Answer, Experience, Options, generate
from mlxroute.errors import (
    ContextTooLong,
    LargeError,
    LargeTimeout,
    LargeUnavailable,
    LargeUnreachable,
    UsageError,
)
from mlxroute.routers import EntropyRouter, make_router
from mlxroute.types import (
    EncodedPrompt,
    LargeToken,
    Message,
    Mode,
    Prices,
    Source,
    StopReason,
    Token,
)
from tests.support.scripted_models import (
    EOS,
    STRADDLING,
    FakeClock,
    ScriptedLarge,
    ScriptedSmall,
    TwoEndVocabulary,
)

DOWN = LargeUnreachable("nobody there")
QUESTION: list[Message] = [{"role": "user", "content": "hi"}]


def run(
    small: ScriptedSmall,
    large: ScriptedLarge | None = None,
    *,
    threshold: float = 1.0,
    max_tokens: int = 100,
    stop: Sequence[str] = (),
    clock: FakeClock | None = None,
    strict: bool = False,
) -> tuple[list[Token], Answer]:
    answer = Answer(
        small,
        large,
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(threshold),
        options=Options(
            max_tokens=max_tokens,
            stop=tuple(stop),
            timeout_s=10.0,
            strict=strict,
            mode=Mode.WAIT,
        ),
        clock=clock or FakeClock(),
    )
    return list(answer), answer


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_a_router_that_never_escalates_leaves_the_small_models_own_answer() -> None:
    large = ScriptedLarge([b"X"])
    tokens, answer = run(ScriptedSmall(b"hello"), large, threshold=math.inf)
    assert text_of(tokens) == "hello"
    assert large.contexts == []
    assert answer.stats().finish_reason is StopReason.EOS


def test_a_router_that_always_escalates_leaves_the_large_models_own_answer() -> None:
    large = ScriptedLarge([b"l", b"a", b"r", b"g", b"e", (EOS,)])
    tokens, answer = run(ScriptedSmall(b"small"), large, threshold=-math.inf)
    assert text_of(tokens) == "large"
    assert {token.source for token in tokens} == {Source.LARGE}
    assert answer.stats().escalation_rate == 1.0
    assert answer.stats().finish_reason is StopReason.EOS


def test_an_escalated_token_replaces_the_small_one_in_the_context() -> None:
    small = ScriptedSmall(b"hello", entropies={1: 2.0})
    tokens, _ = run(small, ScriptedLarge([b"u"]))
    assert [(token.token_id, token.source) for token in tokens[:3]] == [
        (ord("h"), Source.SMALL),
        (ord("u"), Source.LARGE),
        (ord("l"), Source.SMALL),
    ]
    assert small.fed == list(b"hullo")


def test_the_large_model_sees_the_rendered_prompt_and_every_committed_token() -> None:
    large = ScriptedLarge([b"u", b"p"])
    run(ScriptedSmall(b"hello", entropies={1: 2.0, 3: 2.0}), large)
    assert [context.text for context in large.contexts] == ["[user]hi>h", "[user]hi>hul"]
    assert list(large.contexts[1].token_ids) == list(b"[user]hi>hul")


class SpacingSmall(ScriptedSmall):
    """Its tokenizer puts a space before every text."""

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        return replace(super().encode_conversation(messages), drops_space=True)


@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP])
@pytest.mark.parametrize(("script", "shown"), [(b" hello", "hullo"), (b"  hello", " hullo")])
def test_the_tokenizers_space_is_in_the_context_and_not_in_the_answer(
    script: bytes, shown: str, mode: Mode
) -> None:
    large = ScriptedLarge([b"u"])
    small = SpacingSmall(script, entropies={script.index(b"e"): 2.0})
    answer = generate(small, large, "hi", router=EntropyRouter(1.0), mode=mode)
    assert text_of(list(answer)) == answer.stats().text == shown
    before = script[: script.index(b"e")].decode()
    assert [context.text for context in large.contexts] == [f"[user]hi>{before}"]


def test_an_answer_without_a_space_at_its_beginning_is_whole() -> None:
    tokens, _ = run(SpacingSmall(b"a b"))
    assert text_of(tokens) == "a b"


def test_inside_a_character_the_context_ends_before_it_and_names_the_fragment() -> None:
    emoji = "a\U0001f600b".encode()
    large = ScriptedLarge([emoji[3:4]])
    tokens, _ = run(ScriptedSmall(emoji, entropies={3: 2.0}), large)
    assert large.contexts[0].text == "[user]hi>a"
    assert large.contexts[0].fragment_ids == tuple(emoji[1:3])
    assert [token.text for token in tokens[:6]] == ["a", "", "", "", "\U0001f600", "b"]


def test_a_token_that_ends_one_character_and_begins_another_belongs_to_the_fragment() -> None:
    first, *_, last = "éé".encode()
    small = ScriptedSmall([ord("a"), first, STRADDLING, last], entropies={3: 2.0})
    large = ScriptedLarge([(last,)])
    tokens, _ = run(small, large)
    assert large.contexts[0].text == "[user]hi>a"
    assert large.contexts[0].fragment_ids == (first, STRADDLING)
    assert [token.text for token in tokens[:4]] == ["a", "", "é", "é"]


def test_bytes_that_can_never_be_text_are_dropped() -> None:
    tokens, _ = run(ScriptedSmall(b"a\xff\xc3b"))
    assert text_of(tokens) == "ab"


def test_an_answer_cut_in_mid_character_shows_no_replacement_character() -> None:
    tokens, answer = run(ScriptedSmall("né".encode()), max_tokens=2)
    assert text_of(tokens) == "n"
    assert answer.stats().finish_reason is StopReason.LENGTH


def test_agreement_counts_escalations_where_both_models_choose_the_same_token() -> None:
    _, answer = run(ScriptedSmall(b"abc", entropies={0: 2.0, 1: 2.0}), ScriptedLarge([b"a", b"x"]))
    stats = answer.stats()
    assert (stats.escalated, stats.agreed, stats.agreement) == (2, 1, 0.5)


def test_models_that_both_end_agree_whatever_their_end_tokens_are() -> None:
    end = LargeToken((0,), "", True, -0.5, (), None, None, None, 100, 0.1)
    small = ScriptedSmall(b"a", entropies={1: 2.0}, vocabulary=TwoEndVocabulary())
    tokens, answer = run(small, ScriptedLarge([end]))
    assert (answer.stats().escalated, answer.stats().agreed) == (1, 1)
    assert [token.token_id for token in tokens] == [ord("a"), EOS]


def test_a_failed_call_keeps_the_small_token_and_marks_the_position_unchecked() -> None:
    tokens, answer = run(ScriptedSmall(b"abc", entropies={1: 2.0}), ScriptedLarge([DOWN]))
    assert text_of(tokens) == "abc"
    assert [token.checked for token in tokens] == [True, False, True, True]
    stats = answer.stats()
    assert (stats.fallbacks, stats.unchecked, stats.escalated) == (1, 1, 0)
    failed = tokens[1].escalation
    assert failed is not None
    assert failed.failure == "nobody there"


def test_a_position_without_a_call_is_unchecked_but_no_fallback() -> None:
    clock = FakeClock()
    large = ScriptedLarge([DOWN, LargeUnavailable("not now"), b"X"], clock=clock, seconds=1.0)
    tokens, answer = run(
        ScriptedSmall(b"abcd", entropies={0: 2.0, 1: 2.0, 3: 2.0}), large, clock=clock
    )
    assert text_of(tokens) == "abcX"
    assert [token.checked for token in tokens] == [False, False, True, True, True]
    assert tokens[1].escalation is None
    assert (answer.stats().fallbacks, answer.stats().unchecked) == (1, 2)
    # The call that failed cost a second of the ten; the one that was not made, none.
    assert large.deadlines == [10.0, 9.0, 9.0]


def test_a_failed_call_does_not_end_the_calls() -> None:
    large = ScriptedLarge([DOWN, DOWN, DOWN, DOWN, b"e", b"f", (EOS,)])
    tokens, answer = run(ScriptedSmall(b"abcdxy"), large, threshold=-math.inf)
    assert text_of(tokens) == "abcdef"
    assert answer.stats().fallbacks == 4


def test_failures_cost_an_answer_one_timeout_in_all() -> None:
    clock = FakeClock()
    large = ScriptedLarge([LargeTimeout("late")], clock=clock, seconds=6.0)
    tokens, answer = run(ScriptedSmall(b"abcdef"), large, threshold=-math.inf, clock=clock)
    assert text_of(tokens) == "abcdef"
    assert large.deadlines == [10.0, 4.0]
    assert clock.now == 10.0
    assert answer.stats().stall_s == 10.0


def test_attempts_that_failed_before_a_success_count_against_the_same_timeout() -> None:
    clock = FakeClock()
    large = ScriptedLarge([b"x"], clock=clock, seconds=5.5, lost_s=5.0)
    tokens, answer = run(ScriptedSmall(b"abcd"), large, threshold=-math.inf, clock=clock)
    assert text_of(tokens) == "xxcd"
    assert large.deadlines == [10.0, 5.0]
    assert (answer.stats().fallbacks, answer.stats().unchecked) == (0, 3)


@pytest.mark.parametrize("failure", [DOWN, LargeUnavailable("not now")])
def test_strict_raises_the_failure_instead_of_answering_alone(failure: LargeError) -> None:
    with pytest.raises(type(failure)):
        run(ScriptedSmall(b"abc"), ScriptedLarge([failure]), threshold=-math.inf, strict=True)


def test_a_large_token_spelled_as_several_small_ones_is_one_escalation() -> None:
    small = ScriptedSmall(b"abcdef", entropies={1: 2.0})
    tokens, answer = run(small, ScriptedLarge([b"XYZ"]))
    assert text_of(tokens) == "aXYZef"
    assert [token.source for token in tokens[1:4]] == [Source.LARGE] * 3
    assert [token.escalation is not None for token in tokens[1:4]] == [True, False, False]
    assert (answer.stats().escalated, answer.stats().large_tokens) == (1, 3)


def test_the_length_limit_also_cuts_a_spelled_large_token() -> None:
    tokens, answer = run(
        ScriptedSmall(b"abc"), ScriptedLarge([b"WXYZ"]), threshold=-math.inf, max_tokens=2
    )
    assert text_of(tokens) == "WX"
    assert answer.stats().finish_reason is StopReason.LENGTH


def test_the_answer_ends_before_a_stop_string_even_across_tokens() -> None:
    tokens, answer = run(ScriptedSmall(b"one. two. three"), stop=[". t"])
    assert text_of(tokens) == "one" == answer.stats().text
    assert answer.stats().finish_reason is StopReason.STOP_STRING


def test_text_that_only_began_like_a_stop_string_is_released() -> None:
    tokens, _ = run(ScriptedSmall(b"a..b.."), stop=["...", "..c"])
    assert text_of(tokens) == "a..b.."


@given(
    script=st.text(alphabet="ab.\n", max_size=30),
    stop=st.lists(st.text("ab.\n", min_size=1), max_size=3),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(
    script: str, stop: list[str]
) -> None:
    tokens, answer = run(ScriptedSmall(script.encode()), stop=stop)
    text = text_of(tokens)
    # The first moment any stop string is complete decides; nothing after it is decoded.
    expected = script
    for end in range(len(script) + 1):
        matches = [at for at in (script[:end].find(item) for item in stop) if at >= 0]
        if matches:
            expected = script[: min(matches)]
            break
    assert text == expected == answer.stats().text


@given(st.text(max_size=40))
def test_any_text_survives_being_decoded_byte_by_byte(text: str) -> None:
    tokens, answer = run(ScriptedSmall(text.encode(errors="ignore")), max_tokens=1000)
    assert text_of(tokens) == text.encode(errors="ignore").decode() == answer.stats().text


def test_the_end_token_is_committed_without_text() -> None:
    tokens, _ = run(ScriptedSmall(b"a"))
    assert [(token.token_id, token.text) for token in tokens] == [(ord("a"), "a"), (EOS, "")]


def test_a_prompt_beyond_the_context_is_refused_before_any_work() -> None:
    small = ScriptedSmall(b"abc", context=5)
    with pytest.raises(ContextTooLong, match=r"9 tokens .* holds 5"):
        run(small)


def test_an_answer_never_grows_past_the_context() -> None:
    tokens, answer = run(ScriptedSmall(b"abcdef", context=12))
    assert text_of(tokens) == "abc"
    assert answer.stats().finish_reason is StopReason.LENGTH


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        generate(ScriptedSmall(b"a"), None, "  ", router=EntropyRouter(1.0))


def test_stopping_in_the_middle_leaves_a_cancelled_answer_with_its_text() -> None:
    answer = generate(ScriptedSmall(b"abcdef"), None, "hi", router=EntropyRouter(math.inf))
    for token in answer:
        if token.index == 2:
            break
    assert answer.stats().text == "abc"
    assert answer.stats().finish_reason is StopReason.CANCELLED


def test_an_answer_can_be_iterated_once() -> None:
    answer = generate(ScriptedSmall(b"ab"), None, "hi", router=EntropyRouter(math.inf))
    assert text_of(list(answer)) == "ab"
    with pytest.raises(UsageError, match="once"):
        list(answer)


def test_times_and_uploads_are_added_up() -> None:
    clock = FakeClock()
    large = ScriptedLarge([b"a", b"b"], clock=clock, seconds=2.0)
    _, answer = run(ScriptedSmall(b"ab", entropies={0: 2.0, 1: 2.0}), large, clock=clock)
    stats = answer.stats()
    assert (stats.stall_s, stats.ttft_s, stats.uploaded_bytes) == (4.0, 2.0, 200)
    assert (stats.uploaded_tokens, stats.large_cached_tokens) == (20, 16)


def answer_to(question: str, small: ScriptedSmall, mode: str) -> Answer:
    """An answer that the small model writes alone, with the loop of a mode."""
    router = EntropyRouter(math.inf)
    return generate(small, ScriptedLarge([b"x"]), question, router=router, mode=mode)


@pytest.mark.parametrize("mode", ["wait", "overlap"])
def test_an_answer_ends_with_an_error_once_another_was_begun_on_its_small_model(mode: str) -> None:
    small = ScriptedSmall(b"abcd")
    left = iter(answer_to("q", small, mode))
    assert next(left).text == "a"
    assert text_of(list(answer_to("r", small, mode))) == "abcd"
    cached_ids = small.cached_ids
    with pytest.raises(UsageError, match="another answer was begun"):
        next(left)
    assert small.cached_ids == cached_ids
    assert text_of(list(answer_to("r", small, mode))) == "abcd"


@pytest.mark.parametrize("mode", ["wait", "overlap"])
def test_another_answer_may_begin_at_the_last_token(mode: str) -> None:
    small = ScriptedSmall(b"abcd")
    for token in answer_to("q", small, mode):
        if token.token_id == EOS:
            list(answer_to("longer", small, mode))
    assert bytes(small.cached_ids).startswith(b"[user]longer>abcd")


def test_answers_on_small_models_of_their_own_may_alternate() -> None:
    answers = [answer_to("q", ScriptedSmall(b"abcd"), "wait") for _ in range(2)]
    assert [first.text + second.text for first, second in zip(*answers, strict=True)] == [
        *("aa", "bb", "cc", "dd", "")
    ]


def test_a_finished_answers_figures_do_not_change_with_later_ones() -> None:
    small, large = ScriptedSmall(b"ab", entropies={0: 2.0}), ScriptedLarge([b"a", b"b", b"c"])
    experience, router = Experience(), EntropyRouter(1.0)
    prices = Prices(input=1.0, cached_input=1.0, output=1.0)
    first, second, third = (
        generate(small, large, "hi", router=router, prices=prices, experience=experience)
        for _ in range(3)
    )
    list(first)
    stats = first.stats()
    list(second)
    for token in third:
        if token.index == 1:
            break
    assert [answer.stats().requests for answer in (first, second, third)] == [1, 1, 1]
    assert first.stats() == stats


def test_an_answer_takes_no_time_before_it_is_iterated_over() -> None:
    clock = FakeClock()
    options = Options(mode=Mode.WAIT)
    large = ScriptedLarge([b"a"], clock=clock, seconds=2.0)
    small, router = ScriptedSmall(b"ab", entropies={0: 2.0}), EntropyRouter(1.0)
    answer = Answer(small, large, QUESTION, router=router, options=options, clock=clock)
    clock.now = 60.0
    tokens = list(answer)
    stats = answer.stats()
    assert (tokens[0].time_s, stats.ttft_s, stats.total_s) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("mode", ["wait", "overlap"])
def test_the_time_of_a_stopped_answer_goes_up_to_the_stop(mode: str) -> None:
    clock = FakeClock()

    class Interrupted(ScriptedLarge):
        def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
            clock.now += 5.0
            raise KeyboardInterrupt

    small, large = (
        ScriptedSmall(b"ab", entropies={1: 2.0}),
        Interrupted([b"b"], clock=clock, seconds=9),
    )
    options = Options(mode=Mode(mode))
    answer = Answer(small, large, QUESTION, router=EntropyRouter(1.0), options=options, clock=clock)
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    stats = answer.stats()
    assert (stats.text, stats.ttft_s, stats.stall_s, stats.total_s) == ("a", 0.0, 5.0, 5.0)


def test_the_time_of_an_answer_that_is_left_is_that_of_its_last_token() -> None:
    clock = FakeClock()
    options = Options(mode=Mode.WAIT)
    router = EntropyRouter(math.inf)
    answer = Answer(
        ScriptedSmall(b"ab"), None, QUESTION, router=router, options=options, clock=clock
    )
    tokens = answer.events()
    next(tokens)
    clock.now = 60.0
    del tokens
    assert answer.stats().total_s == 0.0


def test_the_speed_has_the_call_for_the_first_token_and_not_the_reading_of_the_prompt() -> None:
    clock = FakeClock()

    class SlowReader(ScriptedSmall):
        def prefill(self, *arguments: Any, **options: Any) -> Any:
            clock.now += 7.0
            return super().prefill(*arguments, **options)

    large = ScriptedLarge([b"a"], clock=clock, seconds=2.0)
    _, answer = run(SlowReader(b"abc", entropies={0: 2.0}), large, max_tokens=2, clock=clock)
    stats = answer.stats()
    # Both tokens are committed when the call ends, with no time between them.
    assert (stats.ttft_s, stats.total_s) == (9.0, 9.0)
    assert stats.tokens_per_s == 0.5


def test_one_token_has_no_speed() -> None:
    clock = FakeClock()
    large = ScriptedLarge([b"a"], clock=clock, seconds=2.0)
    _, answer = run(ScriptedSmall(b"ab", entropies={0: 2.0}), large, max_tokens=1, clock=clock)
    assert answer.stats().tokens_per_s == 0.0


@pytest.mark.parametrize(
    "options",
    [
        *({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}),
        *({"top_k": -1}, {"top_k": 0.5}, {"min_p": -0.1}, {"min_p": 1.5}),
        *({"timeout_s": 0.0}, {"timeout_s": math.inf}, {"seed": -1}, {"seed": 2**64}),
        *({name: math.nan} for name in ("temperature", "top_p", "min_p", "timeout_s")),
        *(
            {"accept_within": -1.0},
            {"accept_within": math.nan},
            {"accept_within": math.inf},
            {"call_ceiling": math.nan},
        ),
        *({"max_tokens": 1.5}, {"max_tokens": True}, {"seed": 0.5}, {"prefetch": 10**5000}),
        *({"temperature": "hot"}, {"temperature": None}, {"temperature": math.inf}),
        *({"stop": None}, {"stop": [5]}, {"never_send": None}, {"never_send": re.compile("x")}),
        *({"never_send": "secret"}, {"never_send": ["secret"]}, {"never_send": [re.compile(b"x")]}),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^[a-z_]+ must be "):
        generate(ScriptedSmall(b"a"), None, "hi", router=EntropyRouter(1.0), **options)  # type: ignore[arg-type]


_ADDRESS = "http://me:word@x/v1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("small", "m"), ("small", None), ("large", _ADDRESS), ("router", "entropy")),
        *(("router", EntropyRouter), ("router", None), ("prices", {"input": 1})),
        *(("experience", {}), ("on_failure", None)),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_paid_for(
    name: str, value: object
) -> None:
    arguments: dict[str, Any] = {"small": ScriptedSmall(b"a"), "large": None}
    arguments |= {"router": EntropyRouter(1.0), name: value}
    with pytest.raises(UsageError, match=f"^{name} must be ") as caught:
        generate(messages="hi", **arguments)
    assert caught.value.parameter == name
    assert "word" not in str(caught.value)


def test_a_router_of_a_head_that_is_not_loaded_makes_no_calls() -> None:
    large = ScriptedLarge([b"x"])
    answer = generate(ScriptedSmall(b"a"), large, "hi", router=make_router("head", threshold=5.0))
    with pytest.raises(UsageError, match="needs a learned head"):
        list(answer)
    assert large.contexts == []


def test_one_stop_text_is_not_taken_for_its_characters() -> None:
    small = ScriptedSmall(b"DEN END.")
    answer = generate(small, None, "hi", router=EntropyRouter(9.0), stop="END")
    assert text_of(list(answer)) == "DEN "


def test_options_are_brought_into_the_form_that_the_engine_compares() -> None:
    patterns = [re.compile("x")]
    options = Options(stop="END", mode="wait", never_send=patterns)  # type: ignore[arg-type]
    assert (options.stop, options.never_send) == (("END",), tuple(patterns))
    assert options.mode is Mode.WAIT
    with pytest.raises(UsageError, match="unknown mode 'fast'"):
        Options(mode="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.OVERLAP])
def test_no_call_asks_for_more_tokens_than_the_answer_has_room_for(mode: Mode) -> None:
    large = ScriptedLarge([b"X"])
    options = Options(max_tokens=4, mode=mode, prefetch=8)
    router = EntropyRouter(-math.inf)
    small, messages = ScriptedSmall(b"abcdefgh"), [{"role": "user", "content": "hi"}]
    answer = Answer(small, large, messages, router=router, options=options, clock=FakeClock())
    assert len(list(answer)) == 4
    assert large.prefetches == [3, 2, 1, 0]
