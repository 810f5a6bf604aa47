"""Labels, and heads fitted to them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import psutil
import pytest
from rich.console import Console

from mlxroute.backend.load import load
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.commands import train
from mlxroute.config import Settings
from mlxroute.engine import generate
from mlxroute.errors import LargeError, LargeRefused, UsageError, WeightsError
from mlxroute.questions.question_files import AnswerKind, Question
from mlxroute.recorded.large_answers import LargeAnswer, write_large_answers
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.routers import make_router
from mlxroute.serving.concurrent_answers import ConcurrentAnswers, SharedSmallClient
from mlxroute.small import SmallModel
from mlxroute.training import labels
from mlxroute.training.head_fitting import FittedHead, _deferral_loss, fit_head, recall
from mlxroute.training.head_shapes import Positions, fit_linear
from mlxroute.training.labels import LabelledAnswer, collect_labels, to_list
from mlxroute.types import LabelKind, LargeToken
from tests.support.scripted_models import ScriptedLarge, ScriptedReply, ScriptedWholeAnswer
from tests.support.tiny import final_hidden_state, make_tiny_model

if TYPE_CHECKING:
    from mlxroute.large import LargeModel

_HIDDEN = 64
_QUESTIONS = [Question(str(i), f"say {i}") for i in range(3)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def small(path: Path) -> SmallModel:
    model, tokenizer = load(path)
    return SmallModel(model, tokenizer, name="tiny")


def synthetic(count: int, *, seed: int = 0) -> list[LabelledAnswer]:
    """Answers in which one dimension of the hidden state decides where the models differ."""
    answers = []
    for key in mx.random.split(mx.random.key(seed), count):
        hidden = mx.random.normal((40, _HIDDEN), key=key)
        features = mx.abs(mx.random.normal((40, 4), key=mx.random.split(key)[0]))
        differs = (hidden[:, 3] > 1.2).astype(mx.float32)
        # The large model's token is likely where the models differ, the small one's elsewhere.
        logprobs = mx.stack([-3 * differs, 3 * differs - 3], axis=1)
        answers.append(
            LabelledAnswer(hidden.astype(mx.float16), features, differs, logprobs, "", 40)
        )
    return answers


def fitted_to(
    answers: list[LabelledAnswer], labels: LabelKind = LabelKind.DIVERGENCE
) -> FittedHead:
    """A head for labels that need no outcomes."""
    questions = [Question(str(i), f"say {i}") for i in range(len(answers))]
    return fit_head(answers, questions, labels=labels, provenance={"small": "s"})


# Labels


def labelled(
    small: SmallModel,
    large: ScriptedLarge,
    folder: Path,
    *,
    questions: list[Question] | None = None,
    at_once: int = 1,
    with_continuations: bool = True,
) -> list[LabelledAnswer]:
    """Labels of answers of up to 6 tokens."""
    with RecordingLarge(large, folder / "replies.jsonl", at_once=at_once) as recording:
        return collect_labels(
            small,
            recording,
            _QUESTIONS[:1] if questions is None else questions,
            examples=[],
            max_tokens=6,
            folder=folder / "labels",
            at_once=at_once,
            with_continuations=with_continuations,
        )


def greedy(small: SmallModel, ids: list[int], count: int) -> list[int]:
    """The small model's continuation of some ids."""
    signals, _ = small.prefill(ids)
    written: list[int] = []
    while len(written) < count and signals.token_id not in small.vocabulary.eos_ids:
        written.append(signals.token_id)
        signals = small.step(signals.token_id)
    return written


def spelled(small: SmallModel, ids: list[int]) -> str:
    return b"".join(map(small.vocabulary.token_bytes, ids)).decode(errors="replace")


@pytest.mark.parametrize("metadata", ["{", "[" * 100_000, "[]", '{"text": 1}', '{"tokens": "x"}'])
def test_a_damaged_file_of_labels_is_named(
    metadata: str, small: SmallModel, tmp_path: Path
) -> None:
    labelled(small, ScriptedLarge([(70,)] * 3), tmp_path, with_continuations=False)
    (file,) = (tmp_path / "labels").glob("*.safetensors")
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(file), arrays, {"answer": metadata})
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"labels {file} is damaged; delete it"):
            labelled(small, ScriptedLarge([]), tmp_path, with_continuations=False)
        file.write_bytes(b"no safetensors")


def test_labels_that_were_read_keep_no_file_open(small: SmallModel, tmp_path: Path) -> None:
    large = ScriptedLarge([(70,)])
    labelled(small, large, tmp_path, questions=_QUESTIONS)
    labels = labelled(small, large, tmp_path, questions=_QUESTIONS)
    assert len(labels) == len(_QUESTIONS)
    opened = [Path(file.path) for file in psutil.Process().open_files()]
    assert not [path for path in opened if path.is_relative_to(tmp_path.resolve())]


def test_labels_mark_positions_where_the_small_model_chooses_another_token(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = list(small.encode_conversation([{"role": "user", "content": "say 0"}]).ids)
    own = greedy(small, ids, 1)[0]
    other = 70 if own != 70 else 71
    (answer,) = labelled(small, ScriptedLarge([(own,), (other,), (70,)]), tmp_path)
    assert answer.hidden.shape == (6, _HIDDEN)
    differs = cast("list[float]", answer.differs.tolist())
    written = [own, other, 70, 70, 70, 70]
    signals, _ = small.prefill(ids)
    for at, token_id in enumerate(written):
        assert differs[at] == float(signals.token_id != token_id)
        hidden = final_hidden_state(small, small.cached_ids)
        assert mx.allclose(answer.hidden[at], hidden, atol=1e-2).item()
        assert answer.features[at].tolist() == pytest.approx(
            [signals.entropy_nats, signals.varentropy, signals.top_logprobs[0], signals.margin],
            rel=1e-4,
        )
        given = cast("list[float]", answer.logprobs[at].tolist())
        assert given[1] == pytest.approx(-0.5)
        if token_id in signals.top_ids:
            place = signals.top_ids.index(token_id)
            assert given[0] == pytest.approx(signals.top_logprobs[place], abs=1e-3)
        signals = small.step(token_id)
    assert (answer.text, answer.token_count) == (spelled(small, written), 6)


def test_models_that_both_end_do_not_disagree(path: Path, tmp_path: Path) -> None:
    model, tokenizer = load(path)
    small = SmallModel(model, tokenizer, name="tiny")
    ids = list(small.encode_conversation([{"role": "user", "content": "say 0"}]).ids)
    (own,) = greedy(small, ids, 1)
    other = 70 if own != 70 else 71
    # What the small model writes there is an end token, but not its usual one.
    tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, own, other}
    small = SmallModel(model, tokenizer, name="tiny")
    end = LargeToken((other,), "", True, -0.5, (), None, None, None, 100, 0.1)
    (answer,) = labelled(small, ScriptedLarge([end]), tmp_path)
    assert answer.differs.tolist() == [0.0]


def test_labels_of_whole_answers_with_another_end_token_are_made_again(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end_id in (small.vocabulary.end_id, 70):
        monkeypatch.setattr(small.vocabulary, "end_id", end_id)
        large = ScriptedLarge([])
        large.is_approximate, large.whole_answer = True, ScriptedWholeAnswer("yes")
        labelled(small, large, tmp_path)
    assert len(list((tmp_path / "labels").iterdir())) == 2


def test_labels_of_a_model_whose_files_changed_are_made_again(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fingerprint, count in (("", 1), ("1a", 2), ("2b", 3), ("1a", 3)):
        monkeypatch.setattr(small, "fingerprint", fingerprint)
        labelled(small, ScriptedLarge([(70,)] * 3), tmp_path)
        assert len(list((tmp_path / "labels").iterdir())) == count


def test_the_small_model_continues_alone_from_each_disagreement(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = list(small.encode_conversation([{"role": "user", "content": "say 0"}]).ids)
    (answer,) = labelled(small, ScriptedLarge([(70,), (71,), (72,)]), tmp_path)
    written = [70, 71, 72, 72, 72, 72]
    differs = cast("list[float]", answer.differs.tolist())
    places = [at for at, value in enumerate(differs) if value]
    assert len(places) == len(answer.continuations) > 2
    for at, text in zip(places, answer.continuations, strict=True):
        tail = greedy(small, ids + written[:at], 6 - at)
        assert text == spelled(small, written[:at] + tail)


def test_a_token_of_several_ids_in_the_small_vocabulary_is_one_position(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = list(small.encode_conversation([{"role": "user", "content": "say 0"}]).ids)
    own = greedy(small, ids, 1)[0]
    other = 70 if own != 70 else 71
    # The small model chooses the first id, too, but not the second.
    (answer,) = labelled(small, ScriptedLarge([(own, other), (72,), (72,), (72,), (72,)]), tmp_path)
    assert answer.token_count == 6
    assert answer.hidden.shape[0] == answer.logprobs.shape[0] == 5
    signals, _ = small.prefill(ids)
    second = small.step(own)
    assert second.token_id != other
    assert cast("list[float]", answer.differs.tolist())[0] == 1
    assert answer.continuations[0] == spelled(small, [own, *greedy(small, [*ids, own], 5)])
    features = cast("list[float]", answer.features[0].tolist())
    assert features[0] == pytest.approx(signals.entropy_nats, rel=1e-4)


def test_labels_of_concurrent_answers_equal_those_of_single_answers(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = labelled(small, ScriptedLarge([(70,)]), tmp_path / "3", questions=_QUESTIONS, at_once=3)
    # Batches smaller than the disagreements of one answer.
    monkeypatch.setattr("mlxroute.training.labels._BATCH_ROWS", 2)
    one = labelled(small, ScriptedLarge([(70,)]), tmp_path / "1", questions=_QUESTIONS)
    assert [answer.continuations for answer in one] == [answer.continuations for answer in three]
    plain = labelled(
        small,
        ScriptedLarge([(70,)]),
        tmp_path / "p",
        questions=_QUESTIONS,
        with_continuations=False,
    )
    # Continuations are added later without a call.
    failing = ScriptedLarge([LargeRefused("called again")])
    more = labelled(small, failing, tmp_path / "p", questions=_QUESTIONS)
    assert [answer.continuations for answer in more] == [answer.continuations for answer in one]
    assert all(answer.continuations == () for answer in plain)
    assert all(mx.array_equal(a.differs, b.differs) for a, b in zip(one, plain, strict=True))


def test_saved_labels_are_not_made_again_and_survive_a_failure(
    small: SmallModel, tmp_path: Path
) -> None:
    questions = [Question(str(i), f"say {i}") for i in range(6)]
    replies: list[ScriptedReply] = [(70,)] * 26
    with pytest.raises(LargeError):
        labelled(
            small, ScriptedLarge([*replies, LargeRefused("no")]), tmp_path, questions=questions
        )
    assert len(list((tmp_path / "labels").iterdir())) == 4
    large = ScriptedLarge([(70,)])
    whole = labelled(small, large, tmp_path, questions=questions)
    # Two tokens of the fifth answer were recorded.
    assert (len(whole), len(large.contexts)) == (6, 10)
    failing = ScriptedLarge([(70,)])
    again = labelled(small, failing, tmp_path, questions=questions)
    assert failing.contexts == []
    assert all(mx.array_equal(a.hidden, b.hidden) for a, b in zip(whole, again, strict=True))


def test_a_run_without_continuations_keeps_those_of_another_run(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[Path, bytes] = {}

    def answer_after_other_run(*arguments: Any, **options: Any) -> list[LargeAnswer]:
        monkeypatch.setattr(labels, "write_large_answers", write_large_answers)
        # The other run has its own replies, but the same labels.
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "labels").symlink_to(tmp_path / "labels")
        labelled(small, ScriptedLarge([(70,)]), tmp_path / "other", questions=_QUESTIONS)
        saved.update({file: file.read_bytes() for file in (tmp_path / "labels").iterdir()})
        return write_large_answers(*arguments, **options)

    monkeypatch.setattr(labels, "write_large_answers", answer_after_other_run)
    large = ScriptedLarge([(70,)])
    plain = labelled(small, large, tmp_path, questions=_QUESTIONS, with_continuations=False)
    assert len(plain) == len(saved) == len(_QUESTIONS)
    assert {file: file.read_bytes() for file in saved} == saved


def test_a_run_has_its_continuations_also_if_another_replaces_the_files(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def answer_after_replacement(*arguments: Any, **options: Any) -> list[LargeAnswer]:
        # As earlier versions did.
        for file in (tmp_path / "labels").iterdir():
            labels._write(replace(labels._read(file), continuations=()), file)
        return write_large_answers(*arguments, **options)

    monkeypatch.setattr(labels, "write_large_answers", answer_after_replacement)
    questions = [Question(str(i), f"say {i}") for i in range(6)]
    answers = labelled(small, ScriptedLarge([(70,)]), tmp_path, questions=questions)
    for answer, question in zip(answers, questions, strict=True):
        assert len(answer.continuations) == sum(to_list(answer.differs)) > 0
        assert len(answer.make_targets(question, LabelKind.CONSEQUENCE)) == 6
    # What lacks continuations in the files is labelled again.
    again = labelled(small, ScriptedLarge([(70,)]), tmp_path, questions=questions)
    assert [item.continuations for item in again] == [item.continuations for item in answers]


_SAVED_NAME = "dde5336d127a5eec36d8463769028363c9ec92c37c98fa019861eda7d208070d.safetensors"


def test_labels_of_an_earlier_version_are_read(small: SmallModel, tmp_path: Path) -> None:
    arrays = {
        "hidden": mx.zeros((2, _HIDDEN), dtype=mx.float16),
        "signals": mx.full((2, 4), 0.25),
        "differs": mx.array([0.0, 1.0]),
        "logprobs": mx.full((2, 2), -0.5),
    }
    metadata = {"answer": '{"text": "ab", "tokens": 2, "alone": ["ac"]}'}
    (tmp_path / "labels").mkdir()
    mx.save_safetensors(str(tmp_path / "labels" / _SAVED_NAME), arrays, metadata)
    (answer,) = labelled(small, ScriptedLarge([LargeRefused("called again")]), tmp_path)
    assert mx.array_equal(answer.hidden, arrays["hidden"])
    assert mx.array_equal(answer.features, arrays["signals"])
    assert mx.array_equal(answer.differs, arrays["differs"])
    assert mx.array_equal(answer.logprobs, arrays["logprobs"])
    assert (answer.text, answer.token_count, answer.continuations) == ("ab", 2, ("ac",))


def test_saved_labels_have_fixed_names(small: SmallModel, tmp_path: Path) -> None:
    (answer,) = labelled(small, ScriptedLarge([(70,)]), tmp_path)
    (file,) = (tmp_path / "labels").iterdir()
    assert file.name == _SAVED_NAME
    arrays, metadata = mx.load(str(file), return_metadata=True)
    assert isinstance(arrays, dict)
    assert isinstance(metadata, dict)
    assert set(arrays) == {"hidden", "signals", "differs", "logprobs"}
    assert json.loads(metadata["answer"]) == {
        "text": answer.text,
        "tokens": answer.token_count,
        "alone": list(answer.continuations),
    }


def test_a_head_that_cannot_be_written_keeps_the_old_one(
    fitted: FittedHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("No space left")

    file = tmp_path / "h.safetensors"
    file.write_bytes(b"an earlier head")
    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="cannot be written"):
        fitted.write(file)
    assert file.read_bytes() == b"an earlier head"
    assert list(tmp_path.iterdir()) == [file]


def test_a_written_head_has_fixed_names(fitted: FittedHead, tmp_path: Path) -> None:
    fitted.write(tmp_path / "h.safetensors")
    _, metadata = mx.load(str(tmp_path / "h.safetensors"), return_metadata=True)
    assert isinstance(metadata, dict)
    assert set(metadata) == {"report", "quantiles", "questions"}
    report = json.loads(metadata["report"])
    assert list(report) == [
        "small",
        "labels",
        "shape",
        "answers",
        "positions",
        "differing",
        "to_find",
        "recall",
    ]
    assert list(report["recall"]) == ["0.03", "0.05", "0.07", "0.1"]
    assert list(report["recall"]["0.1"]) == ["head", "entropy", "random", "oracle"]


def test_an_unchanged_outcome_makes_no_target() -> None:
    question = Question("q", "?", AnswerKind.CHOICE, "B", (("A", "tea"), ("B", "milk")))
    texts = [
        f"The answer is {choice}." for choice in ("tea (A)", "tea (A)", "milk (B)", "milk (B)")
    ]
    answer = LabelledAnswer(
        hidden=mx.zeros((5, 1)),
        features=mx.zeros((5, 4)),
        differs=mx.array([0.0, 1.0, 1.0, 0.0, 1.0]),
        logprobs=mx.zeros((5, 2)),
        text=texts[3],
        token_count=5,
        continuations=tuple(texts[:3]),
    )
    assert answer.make_targets(question, LabelKind.DIVERGENCE) == [0, 1, 1, 0, 1]
    assert answer.make_targets(question, LabelKind.CONSEQUENCE) == [0, 0, 1, 0, 0]
    assert answer.make_targets(question, LabelKind.PREFERENCE) == [0, 0, 1, 0, 0]
    wrong = replace(question, answer="A")
    assert answer.make_targets(wrong, LabelKind.CONSEQUENCE) == [0, 0, 1, 0, 0]
    assert answer.make_targets(wrong, LabelKind.PREFERENCE) == [0, 0, 0, 0, 0]


# Fitting


@pytest.fixture(scope="module")
def fitted() -> FittedHead:
    return fitted_to(synthetic(40))


def check_fit(fitted: FittedHead, labels: LabelKind) -> None:
    rows = fitted.report["recall"]
    assert rows["0.1"]["head"] > 0.7
    assert rows["0.1"]["entropy"] < 0.3
    assert rows["0.1"]["oracle"] >= rows["0.1"]["head"]
    assert fitted.report["answers"] == {"fitted": 32, "held_out": 8}
    assert list(fitted.quantiles) == sorted(fitted.quantiles)
    assert (fitted.report["small"], fitted.report["labels"]) == ("s", labels)


def test_a_head_finds_positions_where_the_models_differ(fitted: FittedHead) -> None:
    check_fit(fitted, LabelKind.DIVERGENCE)


@pytest.mark.usefixtures("few_steps")
def test_a_head_for_deferral_finds_positions_where_the_models_differ() -> None:
    fitted = fitted_to(synthetic(40), LabelKind.DEFERRAL)
    check_fit(fitted, LabelKind.DEFERRAL)
    # The same answers give the same head.
    again = fitted_to(synthetic(40), LabelKind.DEFERRAL)
    assert (again.report, again.quantiles) == (fitted.report, fitted.quantiles)


def test_a_written_head_scores_a_decode_step_like_the_fitted_one(
    small: SmallModel, fitted: FittedHead, tmp_path: Path
) -> None:
    fitted.write(tmp_path / "h.safetensors")
    quantiles = small.load_head(tmp_path / "h.safetensors")
    assert quantiles == fitted.quantiles
    signals, _ = small.prefill(list(small.vocabulary.encode("hello")))
    own = [signals.entropy_nats, signals.varentropy, signals.top_logprobs[0], signals.margin]
    hidden = final_hidden_state(small, small.cached_ids).astype(mx.float32)
    inputs = mx.concatenate([hidden, mx.array(own)])[None]
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


def test_a_head_that_was_read_in_one_thread_scores_steps_in_another(
    small: SmallModel, fitted: FittedHead, tmp_path: Path
) -> None:
    fitted.write(tmp_path / "h.safetensors")
    small.load_head(tmp_path / "h.safetensors")
    recording = RecordingLarge(ScriptedLarge([(70,)]), tmp_path / "r.jsonl")
    conversation = [{"role": "user", "content": "hi"}]

    def write(client: SharedSmallClient) -> list[float]:
        router = make_router("head", budget=0.0)
        return [
            token.score
            for token in generate(client, None, conversation, router=router, max_tokens=2)
        ]

    (scores,) = ConcurrentAnswers(small, on_abort=recording.close).run([(conversation, write)])
    assert all(map(math.isfinite, scores))
    small.set_head(None)


def test_a_head_without_quantiles_can_have_a_budget(
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
    for broken in (
        "[",
        "[" * 100_000,
        "{}9",
        "[1e999]",
        "[" + "9" * 400 + "]",
        "5",
        '["a"]',
        "[null]",
    ):
        mx.save_safetensors(str(tmp_path / "broken.safetensors"), arrays, {"quantiles": broken})
        with pytest.raises(WeightsError, match="broken metadata") as caught:
            small.load_head(tmp_path / "broken.safetensors")
        assert str(caught.value).isprintable()
    small.set_head(None)


@pytest.mark.usefixtures("few_steps")
def test_heads_that_are_fitted_at_once_equal_those_fitted_alone() -> None:
    positions = Positions.of([(item, to_list(item.differs)) for item in synthetic(8)])
    heads = fit_linear(positions, _deferral_loss, [2, 16, 128])
    for head, count in zip(heads, (2, 16, 128), strict=True):
        (alone,) = fit_linear(positions, _deferral_loss, [count])
        assert positions.score(head) == pytest.approx(positions.score(alone), abs=1e-3)
    assert positions.score(heads[0]) != pytest.approx(positions.score(heads[1]), abs=0.1)


@pytest.mark.usefixtures("few_steps")
def test_too_little_training_data_is_an_error() -> None:
    with pytest.raises(UsageError, match="at least 10 answers, not 9"):
        fitted_to(synthetic(9))
    same = [replace(answer, differs=mx.zeros(40)) for answer in synthetic(20)]
    with pytest.raises(UsageError, match="nothing to learn"):
        fitted_to(same)
    failing = [replace(answer, logprobs=mx.full((40, 2), math.nan)) for answer in synthetic(20)]
    with pytest.raises(UsageError, match="its server gives them for 9 of 20 answers"):
        fitted_to([*synthetic(9), *failing[9:]], LabelKind.DEFERRAL)
    # Without the few answers that have none, a head is fitted.
    mixed = fitted_to([*synthetic(18), *failing[18:]], LabelKind.DEFERRAL)
    assert mixed.report["answers"] == {"fitted": 14, "held_out": 4}


def test_recall_counts_targets_among_the_highest_scores() -> None:
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
            ["--out", "folder.safetensors", "--large", "http://127.0.0.1:9/v1"],
            "folder.safetensors: a head is a .safetensors file",
        ),
        (
            ["--out", "q.jsonl/h.safetensors", "--large", "http://127.0.0.1:9/v1"],
            "q.jsonl is not a folder to write to (--out)",
        ),
        (
            ["--out=h.safetensors", "--large=http://127.0.0.1:9/v1", "--labels=preference"],
            "needs right answers",
        ),
    ],
)
def test_train_reports_wrong_arguments(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.safetensors").mkdir()
    rows = [json.dumps({"prompt": f"Why {number}?"}) for number in range(10)]
    Path("q.jsonl").write_text("\n".join(rows))
    assert main(["train", "--data", "q.jsonl", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_train_warns_of_questions_that_the_adapter_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"Why {number}?" for number in range(10)]
    rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    trained = {"questions": [Question("1", prompts[3]).fingerprint]}
    (tmp_path / "provenance.json").write_text(json.dumps(trained))
    train = ["train", "--data", str(tmp_path / "q.jsonl"), "--adapter", str(tmp_path)]
    # The adapter has no weights, so nothing is trained.
    assert main([*train, "--large", "http://127.0.0.1:9/v1"]) != 0
    assert "trained with 1 of these 10 questions" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("labels", "cut_off", "is_warned"),
    [
        (LabelKind.CONSEQUENCE, 2, True),
        (LabelKind.CONSEQUENCE, 1, False),
        (LabelKind.PREFERENCE, 2, True),
        (LabelKind.DIVERGENCE, 20, False),
    ],
)
def test_train_warns_of_answers_that_were_cut_off(
    labels: LabelKind, cut_off: int, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [
        replace(answer, token_count=40 if number < cut_off else 39)
        for number, answer in enumerate(synthetic(20))
    ]
    monkeypatch.setattr(train, "load_paired_small", lambda *_: SimpleNamespace(name="tiny"))
    monkeypatch.setattr(train, "check_questions_fit", lambda *_: None)
    monkeypatch.setattr(train, "_label_answers", lambda *_: answers)
    monkeypatch.setattr("mlxroute.training.head_fitting.fit_head", lambda *_, **__: None)
    err = Console(file=io.StringIO(), width=300)
    material = train._Material([], [], [], labels, tokens=40, at_once=1)
    train._fit(Settings(), cast("LargeModel", ScriptedLarge([])), material, err)
    said = "2 of 20 answers of the large model were cut off at 40 tokens, and are judged by what"
    assert (said in cast("io.StringIO", err.file).getvalue()) == is_warned


def test_an_unreadable_head_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = make_tiny_model(tmp_path / "tiny")
    (tmp_path / "h.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError):
        SmallModel(*load(tiny), name="tiny").load_head(tmp_path / "h.safetensors")
    head = str(tmp_path / "h.safetensors")
    ask = ["ask", "--offline", "--small", str(tiny), "--router", "head", "--budget", "7%"]
    assert main([*ask, "--head", head, "hi"]) == 2
    assert "cannot be read" in capsys.readouterr().err
