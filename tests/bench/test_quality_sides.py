"""`bench quality`: baselines, gaps, comparisons, tables and the form of the questions."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from mlxroute.bench.quality.agreement import compare_agreement, token_f1
from mlxroute.bench.quality.baselines import UNCALIBRATED, BaselineRouter, starts_sentence
from mlxroute.bench.quality.comparisons import compare_sides, pair_with_best_baseline
from mlxroute.bench.quality.graded_answers import QualityRow
from mlxroute.bench.quality.side_figures import accuracy_figures, side_figures
from mlxroute.bench.quality.sides import LARGE, SMALL, QualitySide, make_sides
from mlxroute.bench.significance import difference_interval, mean_interval, ratio_interval
from mlxroute.cli import main
from mlxroute.cli.quality_tables import print_quality
from mlxroute.config.setting_choices import BenchRouterName, RouterName
from mlxroute.questions.prompt_form import choose_examples_file, describe_form
from mlxroute.questions.question_files import AnswerKind, Question
from mlxroute.routers import BURST
from mlxroute.serving.concurrent_answers import SharedSmallClient
from mlxroute.types import Judgement
from tests.support.scripted_models import signals

_ROW = QualityRow("q", "", None, None, 10, 1, 0, 0, 1, 50, 0.5, 0.25, False, ())


class _TextSmall:
    """An answer's small model whose tokens are characters."""

    vocabulary: Any

    def __init__(self) -> None:
        self.vocabulary = self
        self.answer_ids: list[int] = []

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


def _escalated_places(name: str, budget: float, texts: list[str]) -> list[list[int]]:
    """Return the escalated positions of answers whose tokens are characters."""
    router = BaselineRouter(name, budget)
    places: list[list[int]] = []
    for number, text in enumerate(texts):
        small = _TextSmall()
        router.begin_answer(cast("SharedSmallClient", small), seed=f"question {number}")
        places.append([])
        for place, character in enumerate(text):
            score = router.score(signals(ord(character)), router.state.positions)
            judgement, router.state = router.state.decide(score)
            if judgement is Judgement.ESCALATE:
                places[-1].append(place)
            small.answer_ids.append(ord(character))
    return places


def _rows(marks: str) -> list[QualityRow]:
    """Return answers: `1` is right, `0` wrong, `-` no answer."""
    values = {"1": True, "0": False, "-": None}
    return [replace(_ROW, strict=values[mark], lenient=values[mark]) for mark in marks]


def test_every_router_can_be_measured() -> None:
    assert {name.value for name in BenchRouterName} == {
        *(name.value for name in RouterName),
        *UNCALIBRATED,
    }


def test_position_escalates_the_first_position_alone() -> None:
    places = _escalated_places("position", 0.5, ["x" * 20] * 40)
    assert {place for answer in places for place in answer} == {0}
    # The budget allows more than one token an answer.
    assert sum(map(len, places)) == 40


def test_position_stays_within_the_budget() -> None:
    places = _escalated_places("position", 0.02, ["x" * 20] * 100)
    assert {place for answer in places for place in answer} == {0}
    assert 30 <= sum(map(len, places)) <= 0.02 * 2000 + BURST


def test_first_escalates_the_first_positions_that_the_budget_allows() -> None:
    places = _escalated_places("first", 0.2, ["x" * 20] * 60)
    assert all(answer == list(range(len(answer))) for answer in places[20:])
    assert statistics.fmean(map(len, places)) == pytest.approx(4, abs=0.5)
    assert {len(answer) for answer in places[20:]} <= {3, 4, 5}


def test_random_escalates_by_chance_in_each_answer() -> None:
    places = _escalated_places("random", 0.2, ["x" * 20] * 60)
    assert places == _escalated_places("random", 0.2, ["y" * 20] * 60)
    assert 0.1 * 1200 < sum(map(len, places)) <= 0.2 * 1200 + BURST
    assert {place for answer in places[20:] for place in answer} == set(range(20))
    # The first questions of all chats have a router in the same state.
    firsts = set()
    for number in range(4):
        router = BaselineRouter("random", 0.2)
        router.begin_answer(cast("SharedSmallClient", _TextSmall()), seed=f"question {number}")
        firsts.add(tuple(router.score(signals(0), place) for place in range(5)))
    assert len(firsts) == 4


def test_sentence_escalates_the_first_token_of_every_sentence() -> None:
    places = _escalated_places("sentence", 0.5, ["Yes. It is 3.5 m. (So!) Why?\nOh"] * 3)
    # A character is a token: a space before a word is a token of its own here.
    assert places[-1] == [0, 5, 18, 24, 29]


@pytest.mark.parametrize(
    ("text", "token", "is_start"),
    [
        ("", "The", True),
        ("", "\n", True),
        ("Yes.", " It", True),
        ("Yes. ", "It", True),
        ('"Yes."', " It", True),
        ("Yes", ".", False),
        ("Yes.", " ", False),
        ("Yes.", "", False),
        ("It is 3.", "5", False),
        ("Yes", " it", False),
        ("Yes", "\nIt", True),
        ("- tea\n", "- milk", True),
    ],
)
def test_starts_of_sentences(text: str, token: str, is_start: bool) -> None:
    assert starts_sentence(text, token) is is_start


def test_the_gap_recovered_lies_between_the_models_alone() -> None:
    rows = {
        "small": _rows("1" * 20 + "0" * 80),
        "large": _rows("1" * 70 + "0" * 30),
        "head 5%": _rows("1" * 45 + "-" * 55),
    }
    side = QualitySide("head 5%", "head", 0.05)
    figures = side_figures(side, rows, 1, max_tokens=20)
    assert figures["lenient"]["gap_recovered"] == 0.5
    low, high = figures["lenient"]["gap_interval"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert figures["lenient"]["no_answer"] == 55
    assert figures["lenient"]["right"] == "1" * 45 + "0" * 55
    assert figures["large_tokens_per_question"] == 1
    ends = [
        side_figures(end, rows, 1, max_tokens=20)["lenient"]["gap_recovered"]
        for end in (SMALL, LARGE)
    ]
    assert ends == [0, 1]


def test_answers_of_earlier_versions_count_as_cut_off_at_the_limit() -> None:
    kinds = (True, False, None)
    rows = [replace(_ROW, tokens=20, is_cut_off=kind) for kind in kinds]
    rows += [replace(_ROW, tokens=19, is_cut_off=kind) for kind in kinds]
    figures = side_figures(SMALL, {"small": rows}, 1, max_tokens=20, has_answers=False)
    assert figures["reached_limit"] == 3


@pytest.mark.parametrize("large", ["1100", "1000", "1110"])
def test_a_gap_that_may_be_none_has_no_interval(large: str) -> None:
    rows = {"small": _rows("1100"), "large": _rows(large), "head 5%": _rows("1110")}
    side = QualitySide("head 5%", "head", 0.05)
    figures = side_figures(side, rows, 1, max_tokens=20)["lenient"]
    assert figures["gap_interval"] is None
    assert figures["gap_recovered"] == (1.0 if large == "1110" else None)


def test_a_side_without_the_models_alone_has_no_comparisons() -> None:
    side = QualitySide("head 5%", "head", 0.05)
    figures = side_figures(side, {side.name: _rows("1100")}, 1, max_tokens=20)["lenient"]
    assert figures["accuracy"] == 0.5
    for name in ("over_small", "p_against_small", "gap_recovered", "gap_interval"):
        assert figures[name] is None


def test_the_interval_of_a_ratio_holds_it_in_95_of_100_samples() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(400):
        pairs = [(draw.random() < 0.2, draw.random() < 0.6, draw.random()) for _ in range(200)]
        gaps = [float(large) - float(small) for small, large, _ in pairs]
        gains = [
            gap if chance < 0.5 else 0.0 for gap, (_, _, chance) in zip(gaps, pairs, strict=True)
        ]
        interval = ratio_interval(gains, gaps)
        assert interval is not None
        held += interval[0] <= 0.5 <= interval[1]
    assert 0.92 <= held / 400 <= 0.98


def test_a_side_that_is_right_where_one_model_is_has_no_interval_of_the_gap() -> None:
    small, large = [True] * 10 + [False] * 30, [True] * 30 + [False] * 10
    routed = [True] * 20 + [False] * 20
    for marks, share in ((small, 0.0), (large, 1.0)):
        figures = accuracy_figures(marks, small, large)
        assert (figures["gap_recovered"], figures["gap_interval"]) == (share, None)
    assert accuracy_figures(routed, small, large)["gap_interval"] is not None


def test_intervals_of_ratios_and_differences_have_known_values() -> None:
    # Fieller's interval of a constant ratio is that ratio.
    assert ratio_interval([1, 2, 3], [2, 4, 6]) == pytest.approx((0.5, 0.5))
    assert ratio_interval([1.0], [1.0]) is None
    # 10 / 102 +- 1.96 sqrt((32 / 102 - (10 / 102) ** 2) / 102)
    assert difference_interval(20, 10, 100) == pytest.approx((-0.00898, 0.20506), abs=1e-5)
    low, high = difference_interval(0, 0, 100)
    assert mean_interval([1.0]) == (1, 1)
    # 2 +- 1.96 / sqrt(3)
    assert mean_interval([1, 2, 3]) == pytest.approx((0.86842, 3.13158), abs=1e-5)
    assert -low == high == pytest.approx(0.02717, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("The sea is blue.", "the sea is BLUE", 1.0),
        ("blue is the sea", "the sea is blue", 1.0),
        ("the sea", "the sea is blue", 2 * 2 / 6),
        ("the the the", "the sea", 2 * 1 / 5),
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("", " .", 1.0),
        ("It’s “blue” – really…", "its blue really", 1.0),
    ],
)
def test_the_f1_score_of_words(text: str, reference: str, expected: float) -> None:
    assert token_f1(text, reference) == token_f1(reference, text) == pytest.approx(expected)


def test_agreement_is_compared_answer_by_answer() -> None:
    def answers(*texts: str) -> list[QualityRow]:
        return [replace(_ROW, text=text) for text in texts]

    large = answers("a b", "a b", "a b", "a b")
    compared = compare_agreement(
        answers("a b", "a b", "a c", "a b"), answers("c", "c", "a b", "a b"), large
    )
    assert (compared["more_first"], compared["more_second"]) == (2, 1)
    assert compared["difference"] == pytest.approx((1 + 1 - 0.5) / 4)
    assert compared["p"] == 1


def test_two_sides_are_compared_on_the_same_questions() -> None:
    rows = {"a": _rows("111111110"), "b": _rows("0000001-1")}
    (item,) = compare_sides([("a", "b")], rows)
    assert (item["first"], item["second"]) == ("a", "b")
    for kind in ("strict", "lenient"):
        assert (item[kind]["only_first"], item[kind]["only_second"]) == (7, 1)
        assert item[kind]["p"] == pytest.approx(18 / 256, abs=1e-4)
        assert item[kind]["difference"] == pytest.approx(6 / 9, abs=1e-4)
    (reverse,) = compare_sides([("b", "a")], rows)
    assert reverse["lenient"]["difference"] == -item["lenient"]["difference"]


def test_every_side_is_compared_with_the_best_baseline_of_its_budget() -> None:
    sides = make_sides(["head", "entropy", "first", "random"], [0.05, 0.07])
    marks = {
        "small": "0000",
        "large": "1111",
        "head 5%": "1110",
        "entropy 5%": "1100",
        "first 5%": "1000",
        "random 5%": "0000",
        "head 7%": "1110",
        "entropy 7%": "1000",
        "first 7%": "1110",
        "random 7%": "0000",
    }
    rows = {name: _rows(text) for name, text in marks.items()}
    assert pair_with_best_baseline(sides, rows) == [
        ("head 5%", "entropy 5%"),
        ("head 7%", "first 7%"),
        ("entropy 5%", "first 5%"),
        ("entropy 7%", "first 7%"),
    ]
    assert pair_with_best_baseline(make_sides(["head"], [0.05]), rows) == []


def _report(large: str) -> dict[str, Any]:
    sides = make_sides(["head", "first"], [0.05])
    marks = {"small": "0000100000", "large": large, "head 5%": "1111110000", "first 5%": "1" * 10}
    rows = {name: _rows(text) for name, text in marks.items()}
    return {
        "questions": 10,
        "form": "2 worked examples as earlier turns, such as: So (A).",
        "tokens": 20,
        "sides": {side.name: side_figures(side, rows, 1, max_tokens=20) for side in sides},
        "comparisons": compare_sides(pair_with_best_baseline(sides, rows), rows),
        "oracles": {"gold": [{"budget": 0.05, "accuracy": 0.9, "large_tokens_per_question": 0.3}]},
    }


def _shown(report: dict[str, Any]) -> list[str]:
    text = StringIO()
    # Rows of two digits fit into 80 columns.
    print_quality(report, Console(file=text, width=80))
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_the_tables_name_form_costs_and_pairs() -> None:
    lines = _shown(_report("1111101111"))
    assert lines[0] == "10 questions, 2 worked examples as earlier turns, such as: So (A)."
    assert lines[1] == (
        "per cent, 95 % intervals; large tokens, calls, sent tokens, seconds a question"
    )
    assert lines[2:4] == [
        "in gap",
        "side strict form lenient recovered large calls sent s",
    ]
    assert "large 90.0 100 90.0 (60..98) 1.00 1.00 50 0.5" in lines
    assert "head 5% 60.0 100 60.0 (31..83) 62.5 (21..119) 1.00 1.00 50 0.5" in lines
    assert "oracle, gold (luck) 5% 90.0 0.30" in lines
    assert "head 5% first 5% 0 4 -40.0 (-69..2) 0.12" in lines
    assert not any("strict marks say little" in line for line in lines)


def test_unchecked_tokens_are_named_where_a_side_has_some() -> None:
    report = _report("1111101111")
    assert not any("unchecked" in line for line in _shown(report))
    report["sides"]["head 5%"]["unchecked"] = 3
    report["sides"]["first 5%"]["unchecked"] = 1
    lines = " ".join(_shown(report))
    assert "did not continue the answer): 3 of head 5%, 1 of first 5%" in lines


def test_budgets_of_one_name_are_one_side() -> None:
    # 2.9 % is a little below 0.029.
    names = [side.name for side in make_sides(["first"], [2.9 / 100, 0.029, 0.05])]
    assert names == ["small", "large", "first 2.9%", "first 5%"]


def test_answers_of_the_large_model_in_another_form_give_a_warning() -> None:
    lines = _shown(_report("111110----"))
    assert "the large model gave 6 of 10 answers in the requested form" in " ".join(lines)


def test_worked_examples_are_chosen_by_the_kind_of_the_questions() -> None:
    choice = Question("c", "?", AnswerKind.CHOICE, "A", (("A", "tea"),), instruction="Explain.")
    number = Question("n", "?", AnswerKind.NUMBER, "3", instruction="Solve.")
    assert choose_examples_file([choice, choice]) == "choice_examples.jsonl"
    assert choose_examples_file([number]) == "number_examples.jsonl"
    assert choose_examples_file([choice, number]) is None
    # A prompt with a number as its answer says itself what is asked for.
    assert choose_examples_file([replace(number, instruction="")]) is None
    assert choose_examples_file([Question("t", "?")]) is None


def test_the_form_is_described() -> None:
    number = Question("n", "?", AnswerKind.NUMBER, "3", instruction="Solve.")
    example = replace(number, worked_answer="So \\boxed{3}.")
    assert describe_form([number], [example]) == (
        "instruction: Solve.; after 1 worked examples as earlier turns, such as: So \\boxed{3}."
    )
    assert describe_form([number, number], []) == "instruction: Solve."
    assert describe_form([Question("t", "?")], []) == "the prompt alone"


@pytest.mark.parametrize(
    "pair", ["head 5%", "small,head 7%", "small,", "small;large", "small,small"]
)
def test_an_unknown_side_is_named(
    pair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "answer": "so"}) + "\n")
    arguments = ["bench", "quality", "--data", str(file), "--large", "http://127.0.0.1:9/v1"]
    arguments += ["--router", "first", "--budget", "5%", "--compare", pair]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"--compare {pair}: name two sides" in " ".join(said.split())
    assert "small, large, first 5%" in " ".join(said.split())
