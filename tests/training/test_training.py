"""Labels, and heads fitted to them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from mlxroute.backend.load import load
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.engine import generate
from mlxroute.errors import LargeError, LargeRefused, UsageError, WeightsError
from mlxroute.questions.question_files import AnswerKind, Question
from mlxroute.recorded.replies import Replies
from mlxroute.routers import make_router
from mlxroute.small import SmallModel
from mlxroute.training.head_fitting import FittedHead, fit_head, recall
from mlxroute.training.labels import LabelledAnswer, collect_labels
from mlxroute.types import LabelKind
from tests.support.fakes import Reply, ScriptedLarge
from tests.support.tiny import make_tiny_model

_HIDDEN = 64
_QUESTIONS = [Question(str(i), f"say {i}") for i in range(3)]


class Named(ScriptedLarge):
    """A scripted large model with a name."""

    model_name = "scripted"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


def synthetic(count: int, *, seed: int = 0) -> list[LabelledAnswer]:
    """Answers in which one direction of the state says where the models differ."""
    key = mx.random.key(seed)
    found = []
    for each in mx.random.split(key, count):
        hidden = mx.random.normal((40, _HIDDEN), key=each)
        signals = mx.abs(mx.random.normal((40, 4), key=mx.random.split(each)[0]))
        differs = (hidden[:, 3] > 1.2).astype(mx.float32)
        # The large model's token is likely where the models differ, the small one's elsewhere.
        logprobs = mx.stack([-3 * differs, 3 * differs - 3], axis=1)
        found.append(LabelledAnswer(hidden.astype(mx.float16), signals, differs, logprobs, "", 40))
    return found


def fitted_to(
    answers: list[LabelledAnswer], labels: LabelKind = LabelKind.DIVERGENCE
) -> FittedHead:
    """A head for labels that need no outcomes."""
    questions = [Question(str(i), f"say {i}") for i in range(len(answers))]
    return fit_head(answers, questions, labels=labels, provenance={"small": "s"})


# Labels


def labelled(
    small: SmallModel,
    large: Named,
    folder: Path,
    *,
    questions: list[Question] | None = None,
    at_once: int = 1,
    with_continuations: bool = True,
) -> list[LabelledAnswer]:
    """What `collect` gives for answers of up to 6 tokens."""
    with Replies(large, folder / "replies.jsonl", at_once=at_once) as replies:
        return collect_labels(
            small,
            replies,
            _QUESTIONS[:1] if questions is None else questions,
            examples=[],
            max_tokens=6,
            folder=folder / "labels",
            at_once=at_once,
            with_continuations=with_continuations,
        )


def greedy(small: SmallModel, ids: list[int], count: int) -> list[int]:
    """What the small model writes behind some ids."""
    signals, _ = small.prefill(ids)
    found: list[int] = []
    while len(found) < count and signals.token_id not in small.vocabulary.eos_ids:
        found.append(signals.token_id)
        signals = small.step(signals.token_id)
    return found


def spelled(small: SmallModel, ids: list[int]) -> str:
    return b"".join(map(small.vocabulary.token_bytes, ids)).decode(errors="replace")


def test_labels_say_where_the_small_model_would_have_written_otherwise(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = small.encode_prompt(small.render([{"role": "user", "content": "say 0"}]))
    own = greedy(small, ids, 1)[0]
    other = 70 if own != 70 else 71
    (found,) = labelled(small, Named([(own,), (other,), (70,)]), tmp_path)
    assert found.hidden.shape == (6, _HIDDEN)
    differs = cast("list[float]", found.differs.tolist())
    written = [own, other, 70, 70, 70, 70]
    signals, _ = small.prefill(ids)
    for at, token_id in enumerate(written):
        assert differs[at] == float(signals.token_id != token_id)
        assert mx.allclose(found.hidden[at], small.hidden_state(), atol=1e-2).item()
        assert found.features[at].tolist() == pytest.approx(
            [signals.entropy_nats, signals.varentropy, signals.top_logprobs[0], signals.margin],
            rel=1e-4,
        )
        given = cast("list[float]", found.logprobs[at].tolist())
        assert given[1] == pytest.approx(-0.5)
        if token_id in signals.top_ids:
            place = signals.top_ids.index(token_id)
            assert given[0] == pytest.approx(signals.top_logprobs[place], abs=1e-3)
        signals = small.step(token_id)
    assert (found.text, found.token_count) == (spelled(small, written), 6)


def test_the_small_model_goes_on_alone_from_each_disagreement(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = small.encode_prompt(small.render([{"role": "user", "content": "say 0"}]))
    (found,) = labelled(small, Named([(70,), (71,), (72,)]), tmp_path)
    written = [70, 71, 72, 72, 72, 72]
    differs = cast("list[float]", found.differs.tolist())
    places = [at for at, value in enumerate(differs) if value]
    assert len(places) == len(found.continuations) > 2
    for at, text in zip(places, found.continuations, strict=True):
        tail = greedy(small, ids + written[:at], 6 - at)
        assert text == spelled(small, written[:at] + tail)


def test_a_token_that_the_small_vocabulary_spells_in_parts_is_one_position(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = small.encode_prompt(small.render([{"role": "user", "content": "say 0"}]))
    own = greedy(small, ids, 1)[0]
    other = 70 if own != 70 else 71
    # The first part is what the small model would write, the second hardly.
    (found,) = labelled(small, Named([(own, other), (72,), (72,), (72,), (72,)]), tmp_path)
    assert found.token_count == 6
    assert found.hidden.shape[0] == found.logprobs.shape[0] == 5
    signals, _ = small.prefill(ids)
    second = small.step(own)
    assert second.token_id != other
    assert cast("list[float]", found.differs.tolist())[0] == 1
    assert found.continuations[0] == spelled(small, [own, *greedy(small, [*ids, own], 5)])
    seen = cast("list[float]", found.features[0].tolist())
    assert seen[0] == pytest.approx(signals.entropy_nats, rel=1e-4)


def test_labels_of_several_answers_at_once_are_those_of_one_after_the_other(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = labelled(small, Named([(70,)]), tmp_path / "3", questions=_QUESTIONS, at_once=3)
    # Batches smaller than the disagreements of one answer.
    monkeypatch.setattr("mlxroute.training.labels._BATCH_ROWS", 2)
    one = labelled(small, Named([(70,)]), tmp_path / "1", questions=_QUESTIONS)
    assert [each.continuations for each in one] == [each.continuations for each in three]
    plain = labelled(
        small, Named([(70,)]), tmp_path / "p", questions=_QUESTIONS, with_continuations=False
    )
    # What was not wanted then is added without a call.
    silent = Named([LargeRefused("asked again")])
    more = labelled(small, silent, tmp_path / "p", questions=_QUESTIONS)
    assert [each.continuations for each in more] == [each.continuations for each in one]
    assert all(each.continuations == () for each in plain)
    assert all(mx.array_equal(a.differs, b.differs) for a, b in zip(one, plain, strict=True))


def test_what_is_labelled_is_not_asked_again_and_survives_a_fault(
    small: SmallModel, tmp_path: Path
) -> None:
    questions = [Question(str(i), f"say {i}") for i in range(6)]
    replies: list[Reply] = [(70,)] * 26
    with pytest.raises(LargeError):
        labelled(small, Named([*replies, LargeRefused("no")]), tmp_path, questions=questions)
    assert len(list((tmp_path / "labels").iterdir())) == 4
    large = Named([(70,)])
    whole = labelled(small, large, tmp_path, questions=questions)
    # Two tokens of the fifth answer were known.
    assert (len(whole), len(large.contexts)) == (6, 10)
    silent = Named([(70,)])
    again = labelled(small, silent, tmp_path, questions=questions)
    assert silent.contexts == []
    assert all(mx.array_equal(a.hidden, b.hidden) for a, b in zip(whole, again, strict=True))


def test_an_outcome_that_does_not_change_makes_no_label() -> None:
    question = Question("q", "?", AnswerKind.CHOICE, "B", (("A", "tea"), ("B", "milk")))
    ends = [f"The answer is {each}." for each in ("tea (A)", "tea (A)", "milk (B)", "milk (B)")]
    found = LabelledAnswer(
        hidden=mx.zeros((5, 1)),
        features=mx.zeros((5, 4)),
        differs=mx.array([0.0, 1.0, 1.0, 0.0, 1.0]),
        logprobs=mx.zeros((5, 2)),
        text=ends[3],
        token_count=5,
        continuations=tuple(ends[:3]),
    )
    assert found.make_targets(question, LabelKind.DIVERGENCE) == [0, 1, 1, 0, 1]
    assert found.make_targets(question, LabelKind.CONSEQUENCE) == [0, 0, 1, 0, 0]
    assert found.make_targets(question, LabelKind.PREFERENCE) == [0, 0, 1, 0, 0]
    wrong = replace(question, answer="A")
    assert found.make_targets(wrong, LabelKind.CONSEQUENCE) == [0, 0, 1, 0, 0]
    assert found.make_targets(wrong, LabelKind.PREFERENCE) == [0, 0, 0, 0, 0]


# Fitting


@pytest.fixture(scope="module")
def fitted() -> FittedHead:
    return fitted_to(synthetic(40))


@pytest.mark.parametrize("labels", [LabelKind.DIVERGENCE, LabelKind.DEFERRAL])
def test_a_head_finds_what_tells_the_models_apart(labels: LabelKind, fitted: FittedHead) -> None:
    again = fitted_to(synthetic(40), labels)
    # The same answers give the same head.
    assert (again.report == fitted.report) == (labels is LabelKind.DIVERGENCE)
    fitted = again
    rows = fitted.report["recall"]
    assert rows["0.1"]["head"] > 0.7
    assert rows["0.1"]["entropy"] < 0.3
    assert rows["0.1"]["oracle"] >= rows["0.1"]["head"]
    assert fitted.report["answers"] == {"fitted": 32, "held_out": 8}
    assert list(fitted.quantiles) == sorted(fitted.quantiles)
    assert (fitted.report["small"], fitted.report["labels"]) == ("s", labels)


def test_a_written_head_scores_as_the_fitted_one_inside_a_step(
    small: SmallModel, fitted: FittedHead, tmp_path: Path
) -> None:
    fitted.write(tmp_path / "h.safetensors")
    quantiles = small.load_head(tmp_path / "h.safetensors")
    assert quantiles == fitted.quantiles
    signals, _ = small.prefill(small.encode_prompt("hello"))
    own = [signals.entropy_nats, signals.varentropy, signals.top_logprobs[0], signals.margin]
    inputs = mx.concatenate([small.hidden_state().astype(mx.float32), mx.array(own)])[None]
    assert signals.head_score == pytest.approx(fitted.head.score(inputs).item(), rel=1e-3, abs=1e-3)
    answer = generate(
        small,
        None,
        "hi",
        router=make_router("head", budget=0.1, quantiles=quantiles),
        max_tokens=4,
    )
    assert all(math.isfinite(token.score) for token in answer)
    small.set_head(None)


def test_a_head_without_ranks_starts_budgets_anywhere(
    small: SmallModel, fitted: FittedHead, tmp_path: Path
) -> None:
    file = tmp_path / "h.safetensors"
    fitted.write(file)
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), arrays)
    quantiles = small.load_head(tmp_path / "plain.safetensors")
    ranks = ScoreRanks.find("tiny", tmp_path).with_quantiles("head", quantiles)
    assert make_router("head", budget=0.1, quantiles=ranks["head"]).state.threshold > 0
    mx.save_safetensors(str(tmp_path / "broken.safetensors"), arrays, {"quantiles": "["})
    with pytest.raises(WeightsError, match="broken metadata"):
        small.load_head(tmp_path / "broken.safetensors")
    small.set_head(None)


def test_too_little_to_learn_from_is_said() -> None:
    with pytest.raises(UsageError, match="at least 10 answers, not 9"):
        fitted_to(synthetic(9))
    same = [replace(each, differs=mx.zeros(40)) for each in synthetic(20)]
    with pytest.raises(UsageError, match="nothing to learn"):
        fitted_to(same)
    silent = [replace(a, logprobs=mx.full((40, 2), math.nan)) for a in synthetic(20)]
    with pytest.raises(UsageError, match="its server gives none"):
        fitted_to(silent, LabelKind.DEFERRAL)


def test_recall_counts_the_differing_among_the_highest() -> None:
    scores, labels = [5.0, 4.0, 3.0, 2.0], [True, False, True, False]
    assert recall(scores, labels, 0.25) == 0.5
    assert recall(scores, labels, 0.75) == 1.0
    assert recall(scores, labels, 0.0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "h.safetensors"], "--large URL"),
        (["--out", "h.txt", "--large", "http://127.0.0.1:9/v1"], "a head is a .safetensors file"),
        (
            ["--out=h.safetensors", "--large=http://127.0.0.1:9/v1", "--labels=preference"],
            "needs right answers",
        ),
    ],
)
def test_train_says_what_it_needs(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text(json.dumps({"prompt": "Why?"}) + "\n")
    assert main(["train", "--data", str(data), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_head_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    (tmp_path / "h.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError):
        SmallModel(*load(tiny), name="tiny").load_head(tmp_path / "h.safetensors")
    head = str(tmp_path / "h.safetensors")
    ask = ["ask", "--offline", "--small", str(tiny), "--router", "head", "--budget", "7%"]
    assert main([*ask, "--head", head, "hi"]) == 2
    assert "cannot be read" in capsys.readouterr().err
