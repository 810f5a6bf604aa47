"""The demo's three answers with scripted models, and what it says about them."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlxroute import weights
from mlxroute.catalog import Catalog, Pair
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli.app import main
from mlxroute.cli.commands.demo import _demo_settings, _fetch_pair, leave_a_core_to_the_server
from mlxroute.cli.demo_story import tell_story
from mlxroute.cli.folders import find_bench_file
from mlxroute.cli.model_fit import Machine
from mlxroute.cli.routing import RoutingRule
from mlxroute.cli.session import Session
from mlxroute.config import Settings
from mlxroute.errors import LargeNotContinued, LargeTimeout, WeightsError
from mlxroute.ledger import Ledger
from mlxroute.questions.demo_question import DemoQuestion, read_demo_question
from mlxroute.routers import make_router
from tests.support.scripted_models import EOS, ScriptedLarge, ScriptedReply, ScriptedSmall

PAIR = Pair("tiny", "huge", same_vocabulary=True, threshold=1.0, calibration="none")
QUESTION = DemoQuestion(
    "Which?",
    ("B", "bee"),
    pair="tiny+huge",
    candidates=30,
    small_wrong=20,
    corrected=9,
    small_right=7,
    spoiled=2,
)
# The small model is unsure of the last letter alone.
SMALL_ANSWER = b"Well, the answer is A."
UNSURE_AT = SMALL_ANSWER.index(b"A")


class Demo:
    """A demo with captured output; large answers are given byte by byte."""

    def __init__(
        self,
        *,
        routed: ScriptedReply = b"B",
        large: str = "The answer is B.",
        large_end: ScriptedReply = (EOS,),
        question: DemoQuestion = QUESTION,
        never_send: tuple[re.Pattern[str], ...] = (),
        small: ScriptedSmall | None = None,
        width: int = 100,
        is_terminal: bool = False,
        rule: dict[str, Any] | None = None,
    ) -> None:
        own_answer: list[ScriptedReply] = [bytes([code]) for code in large.encode()]
        self.large = ScriptedLarge([routed, *own_answer, large_end])
        self.out, self.err = io.StringIO(), io.StringIO()
        router = make_router("entropy", **(rule or {"threshold": 1.0}))
        ranks = ScoreRanks("tiny", "none", 0, {})
        session = Session(
            small or ScriptedSmall(SMALL_ANSWER, entropies={UNSURE_AT: 2.0}),  # type: ignore[arg-type]
            self.large,  # type: ignore[arg-type]
            Settings(mode="wait"),
            routing=RoutingRule(router, ranks, has_large=True),
            ledger=Ledger(),
            never_send=never_send,
        )
        self.code = tell_story(
            session,
            PAIR,
            question,
            heat=False,
            out=Console(file=self.out, width=width, _environ={}),
            err=Console(
                file=self.err,
                width=width,
                color_system=None,
                force_terminal=is_terminal,
                force_interactive=False,
                _environ={},
            ),
        )

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.err.getvalue().splitlines()]

    @property
    def text(self) -> str:
        return " ".join(self.err.getvalue().split())


def test_the_three_answers_are_shown_each_with_its_verdict_and_figures() -> None:
    demo = Demo(width=200)
    assert demo.out.getvalue().splitlines() == [
        "Well, the answer is A.",
        "Well, the answer is B.",
        "The answer is B.",
    ]
    results = [line for line in demo.lines if " · " in line]
    assert len(results) == 3
    assert re.fullmatch(r"wrong: A · 23 tokens in \d.* · nothing uploaded", results[0])
    assert re.fullmatch(
        r"right: B · 23 tokens in \d.* · 1 by the large model \(4\.3%\)"
        r" · uploaded 10 tokens \(8 cached, 100 bytes\) in 1 request",
        results[1],
    )
    assert re.fullmatch(
        r"right: B · 17 tokens in \d.* · uploaded 170 tokens .* in 17 requests", results[2]
    )
    headings = [line for line in demo.lines if re.match(r"\d\. ", line)]
    assert headings == [
        "1. tiny alone",
        "2. tiny, asking huge where entropy is above 1 nats",
        "3. huge alone",
    ]


def test_the_heading_names_the_whole_budget() -> None:
    text = Demo(rule={"budget": 0.07}).text
    assert "asking huge where it is least sure, for at most 7% of the tokens and 4 more" in text


def test_the_expected_outcome_is_told_with_how_the_question_was_chosen() -> None:
    text = Demo().text
    assert "tiny alone was wrong. With 1 of 23 tokens from the large model" in text
    assert "the answer became right. huge alone was right too, with all 17 tokens its own." in text
    assert "it shows the effect: of 30 tried with tiny+huge, routing corrected 9 of" in text
    assert "and made 2 of its 7 right ones wrong or unclear." in text


@pytest.mark.parametrize(
    ("routed", "large", "sentences"),
    [
        (b"C", "The answer is B.", "The routed answer: wrong. huge alone: right."),
        (b"A", "The answer is A.", "The routed answer: wrong. huge alone: wrong."),
        (b"B", "I do not know.", "The routed answer: right. huge alone: unclear."),
    ],
)
def test_another_outcome_is_told_as_it_is(routed: bytes, large: str, sentences: str) -> None:
    text = Demo(routed=routed, large=large).text
    assert f"tiny alone: wrong. {sentences}" in text
    assert "here it came out otherwise. Where two tokens are almost equally likely" in text
    assert "became right" not in text


def test_a_small_model_that_is_right_alone_is_told_too() -> None:
    small = ScriptedSmall(b"The answer is bee.", entropies={14: 2.0})
    text = Demo(small=small, routed=b"b").text
    assert "tiny alone: right. The routed answer: right. huge alone: right." in text


def test_other_models_than_the_measured_ones_are_no_surprise() -> None:
    other = DemoQuestion("Which?", ("C",), pair="a+b", candidates=3, small_wrong=2, corrected=1)
    text = Demo(question=other).text
    assert "came out otherwise. It was chosen with other models." in text


def test_an_own_question_gets_no_verdict() -> None:
    demo = Demo(question=DemoQuestion("Why?"))
    assert not re.search("right|wrong|chosen", demo.text)
    assert demo.lines[1] == "> Why?"
    assert "mlxroute demo --heat" in demo.text
    assert "huge was asked for one token wherever" in demo.text


def test_escalated_tokens_are_listed_with_both_choices() -> None:
    lines = Demo().lines
    header = next(i for i, line in enumerate(lines) if line.startswith("token"))
    assert lines[header].split() == ["token", "after", "small", "model", "large", "model"]
    row = [str(UNSURE_AT + 1), "Well,", "the", "answer", "is", '"A"', '"B"']
    assert lines[header + 1].split() == row
    assert lines[header + 2] == ""


def test_the_text_before_a_token_is_cut_between_words() -> None:
    small = ScriptedSmall(b"Some words that fill the line, the answer is A", entropies={45: 2.0})
    assert '46 …fill the line, the answer is "A" "B"' in Demo(small=small).text


def test_agreement_and_text_like_markup_are_listed_as_they_are() -> None:
    small = ScriptedSmall(b"[b]the answer is B", entropies={0: 2.0, 3: 2.0})
    text = Demo(small=small, routed=b"[", large="the answer is B").text
    assert '1 "[" the same' in text
    assert '4 [b] "t" "t"' not in text
    assert "4 [b]" in text


def test_a_narrow_terminal_has_narrow_tables() -> None:
    demo = Demo(width=40, is_terminal=True)
    assert all(len(line) <= 40 for line in demo.lines if not line.startswith("mlxroute "))
    assert "after" not in demo.text
    assert f'{UNSURE_AT + 1} "A" "B"' in demo.text


def test_a_failed_call_leaves_the_small_models_token_and_is_counted() -> None:
    demo = Demo(routed=LargeTimeout("late"))
    assert demo.out.getvalue().splitlines()[1] == "Well, the answer is A."
    assert f'{UNSURE_AT + 1} Well, the answer is "A" no answer' in demo.text
    assert "1 position should have been checked with huge, which did not answer." in demo.text


def test_the_large_models_answer_ends_where_the_server_fails() -> None:
    demo = Demo(large="The ans", large_end=LargeTimeout("late"))
    assert demo.out.getvalue().splitlines()[2] == "The ans"
    assert "failed: late · 8 tokens" in demo.text
    assert "huge alone: failed." in demo.text


def test_nothing_is_sent_that_must_stay_here() -> None:
    demo = Demo(never_send=(re.compile("Which"),))
    assert demo.large.contexts == []
    assert "failed: kept local by --never-send" in demo.text
    assert "1 position kept local by --never-send." in demo.text


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        (0, {}),
        (0, {"never_send": (re.compile("Which"),)}),
        # The server works, but not for this answer.
        (0, {"routed": LargeNotContinued("elsewhere")}),
        (3, {"routed": LargeTimeout("late")}),
        (3, {"large_end": LargeTimeout("late")}),
        (3, {"large_end": LargeNotContinued("elsewhere")}),
    ],
)
def test_the_exit_code_tells_of_a_large_model_that_failed(
    code: int, faults: dict[str, Any]
) -> None:
    assert Demo(**faults).code == code


def test_the_shipped_question_is_one_of_the_measured_candidates() -> None:
    question = read_demo_question(find_bench_file("questions", "demo.json"))
    assert question.prompt.endswith("then end with: Therefore, the answer is ...")
    assert question.answers
    assert 0 < question.corrected <= question.small_wrong
    assert question.spoiled <= question.small_right <= question.candidates - question.small_wrong
    pair = Catalog.load().find_pair(*question.pair.split("+"))
    assert pair is not None


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("Therefore, the answer is B.", True),
        ("The answer is: **bee**", True),
        ("the answer is A. No: the answer is B", True),
        ("B it is. The answer is A.", False),
        ("The answer is A.\nNot B.", False),
        ("The answer is Abba.", False),
        ("The answer is A. A is not B.", False),
        ("The answer is B - 1 = A", False),
        ("The answer is A + 1 = B.", True),
        ("B", None),
        ("The answer is", None),
        ("", None),
        ("Therefore, the answer is:\n\n**B**.", True),
        ("The answer is **: bee**. Not A.", True),
        ("The answer is not B.", False),
        ("The answer is: *not* a bee.", False),
        ("The answer is B, not A.", True),
    ],
)
def test_only_the_last_conclusion_counts(text: str, is_right: bool | None) -> None:
    assert QUESTION.judge(text) is is_right


@pytest.mark.parametrize("content", ["", "[]", '{"question": "Why?"}'])
def test_a_damaged_question_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(Exception, match=r"demo\.json is not a question for the demo"):
        read_demo_question(tmp_path / "demo.json")


def test_the_demo_keeps_what_the_user_set_for_its_models() -> None:
    settings = _demo_settings(Settings(skip_memory_check=True, timeout=5.0), PAIR)
    assert settings.skip_memory_check
    assert (settings.small, settings.timeout) == ("tiny", 5.0)


def test_offline_a_cached_smaller_pair_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = WeightsError("huge is not in the cache", parameter="offline")
    cached = weights.LocalModel("large", tmp_path, "hub")

    def resolve(name: str, **_: object) -> weights.LocalModel:
        if name == "huge":
            raise missing
        return cached

    def fetch(*pairs: Pair) -> tuple[Pair, weights.LocalModel]:
        machine = Machine(is_dense=False, available_bytes=1 << 40, engine="mlx")
        return _fetch_pair([*pairs], Catalog((), ()), machine, Settings(), Console(stderr=True))

    monkeypatch.setattr(weights, "resolve", resolve)
    smaller = Pair("tiny", "large", same_vocabulary=True, threshold=1.0, calibration="none")
    assert fetch(PAIR, smaller) == (smaller, cached)
    with pytest.raises(WeightsError) as caught:
        fetch(PAIR)
    assert caught.value is missing
    missing.parameter = "cache_dir"
    with pytest.raises(WeightsError):
        fetch(PAIR, smaller)


def test_an_empty_question_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--question", " "]) == 2
    assert "the question is empty (--question)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "own", "threads"), [(2, None, "1"), (8, None, "7"), (1, None, "1"), (8, "3", "3")]
)
def test_one_core_is_left_to_the_server_unless_the_user_says_otherwise(
    cores: int, own: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", own or "")
    if own is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    leave_a_core_to_the_server()
    assert os.environ["OPENBLAS_NUM_THREADS"] == threads
