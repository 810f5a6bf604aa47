"""Adapting a small model to recorded answers."""

from __future__ import annotations

import errno
import io
import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from rich.console import Console

from mlxroute.backend import memory
from mlxroute.backend.load import load
from mlxroute.cli.adapt_notes import warn_of_answers
from mlxroute.errors import LargeProtocolError, LargeRefused, NotEnoughSpace, UsageError
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.recorded.large_answers import LargeAnswer
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.replace_file import replace_file
from mlxroute.small import SmallModel
from mlxroute.training import adaptation
from mlxroute.training.adaptation import adapt_to_answers, make_examples, split_answers
from mlxroute.training.judged_questions import judge_answers
from mlxroute.training.lora_tuning import LoraShape, LoraTuning, can_share_prefix
from mlxroute.training.on_policy import Corrector
from mlxroute.training.own_answers import write_answers
from mlxroute.training.tuning_examples import (
    answer_example,
    find_common_prefix,
    make_batches,
    one_token,
    shuffled_batches,
)
from mlxroute.training.tuning_types import (
    HeldOutFigures,
    InterruptedRun,
    TuningOptions,
    TuningOutcome,
    WorkedAnswer,
)
from mlxroute.types import no_progress
from tests.support.scripted_models import ScriptedLarge
from tests.support.tiny import KINDS, make_tiny_model

_RATE = 2e-3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def small(path: Path) -> SmallModel:
    model, tokenizer = load(path)
    return SmallModel(model, tokenizer, name="tiny")


def worked_answers(small: SmallModel, count: int, *, gold: bool = True) -> list[WorkedAnswer]:
    """Answers that all say the same, to prompts of different lengths."""
    answers = []
    end = min(small.vocabulary.eos_ids)
    for number in range(count):
        text = f"say {number}{'!' * (number % 5)}"
        question = Question(text, text, answer="lazy dog" if gold else None)
        token_ids = (*small.vocabulary.encode("the lazy dog"), end)
        starts = tuple(range(len(token_ids)))
        answer = LargeAnswer(token_ids, starts, (0.0,) * len(token_ids), ((),) * len(token_ids))
        answers.append(WorkedAnswer(question, question_messages(question), answer))
    return answers


def adapt(
    small: SmallModel,
    folder: Path,
    *,
    answers: list[WorkedAnswer] | None = None,
    epochs: int = 6,
    rounds: int = 0,
    corrector: Corrector | None = None,
    start: Path | None = None,
    interrupted: InterruptedRun | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> TuningOutcome:
    """Adapt the model to 12 answers by default; `on_step` is called after each step."""

    def progress(label: str, done: int, total: int | None) -> None:
        if label.startswith("training steps"):
            on_step(done)

    trained, held_out = split_answers(small, answers or worked_answers(small, 12))
    shape = LoraShape(rank=4, layers=2)
    options = TuningOptions(
        shape, _RATE, epochs, max_tokens=5, rounds=rounds, start=start, interrupted=interrupted
    )
    return adapt_to_answers(
        small,
        trained,
        held_out,
        options,
        folder=folder,
        provenance={"small": "tiny"},
        corrector=corrector,
        progress=progress,
    )


# Examples


def test_only_the_answer_is_predicted(small: SmallModel) -> None:
    example = answer_example([5, 6, 7], [8, 9, 10])
    assert example.token_ids == (5, 6, 7, 8, 9)
    assert example.positions == (2, 3, 4)
    assert example.targets == (((8, 1.0),), ((9, 1.0),), ((10, 1.0),))
    other = answer_example([5, 6, 7, 8, 9, 10, 11], [12, 13])
    tuning = LoraTuning(small.model, LoraShape(rank=2, layers=1), learning_rate=_RATE)
    losses = []
    for item in (example, other):
        logits = small.model(mx.array([item.token_ids]))[0]
        chosen = logits[mx.array(item.positions)]
        own = mx.array([target[0][0] for target in item.targets])
        losses += nn.losses.cross_entropy(chosen, own).tolist()
    (batch,) = make_batches([other, example], 2)
    assert tuning.mean_loss([batch]) == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert tuning.mean_loss(make_batches([example, other], 1)) == pytest.approx(
        sum(losses) / 5, rel=1e-4
    )


def test_a_warning_says_if_most_targets_have_no_probabilities(small: SmallModel) -> None:
    first, second = worked_answers(small, 2)
    count = len(second.answer.choices)
    known = replace(second, answer=replace(second.answer, choices=(((5, 1.0),),) * count))

    def shown(*answers: WorkedAnswer) -> str:
        text = io.StringIO()
        warn_of_answers(answers, small.vocabulary, 160, Console(file=text, width=400))
        return text.getvalue()

    assert f"gave no probabilities for {2 * count} of {2 * count} tokens" in shown(first, second)
    assert shown(first, known) == shown(known) == ""


def test_the_large_models_alternatives_are_predicted_as_likely_as_it_finds_them(
    small: SmallModel,
) -> None:
    choices = ((9, 0.6), (3, 0.2))
    example = answer_example([5, 6, 7], [8, 9, 10], {1: choices, 2: ()})
    assert example.targets[0] == ((8, 1.0),)
    assert dict(example.targets[1]) == pytest.approx({9: 0.75, 3: 0.25})
    assert example.targets[2] == ((10, 1.0),)
    tuning = LoraTuning(small.model, LoraShape(rank=2, layers=1), learning_rate=_RATE)
    logits = small.model(mx.array([example.token_ids]))[0]
    logprobs = nn.log_softmax(logits)[mx.array(example.positions)].tolist()
    expected = -(logprobs[0][8] + 0.75 * logprobs[1][9] + 0.25 * logprobs[1][3] + logprobs[2][10])
    # A row with fewer tokens to predict, and padding, change nothing.
    hard = answer_example([5, 6], [7])
    hard_loss = tuning.mean_loss(make_batches([hard], 1))
    both = tuning.mean_loss(make_batches([hard, example], 2))
    assert both == pytest.approx((expected + hard_loss) / 4, rel=1e-4)


def test_examples_have_the_large_models_choices(small: SmallModel) -> None:
    (item,) = worked_answers(small, 1)
    first, *others = item.answer.token_ids
    choices = ((first, 0.3), (7, 0.1))
    answer = replace(item.answer, choices=(choices, *[()] * len(others)))
    (example,) = make_examples(small, [replace(item, answer=answer)])
    assert dict(example.targets[0]) == pytest.approx({first: 0.75, 7: 0.25})
    assert example.targets[1:] == tuple(map(one_token, others))


def test_a_shared_prefix_changes_neither_loss_nor_gradients(path: Path, small: SmallModel) -> None:
    examples = [answer_example([5, 6, 7, 8, 9, *([11] * n)], [12 + n, 3]) for n in (0, 1, 4)]
    prefix_ids = find_common_prefix(examples)
    shorter = [example.without(len(prefix_ids)) for example in examples]
    assert prefix_ids == (5, 6, 7, 8)
    assert [item.token_ids[0] for item in shorter] == [9, 9, 9]
    assert can_share_prefix(small.model)
    written = []
    for prefix, items in (((), examples), (prefix_ids, shorter)):
        model, _ = load(path)
        tuning = LoraTuning(
            model, LoraShape(rank=2, layers=2), learning_rate=_RATE, prefix_ids=prefix
        )
        batches = make_batches(items, 3)
        tuning.train(
            shuffled_batches(batches),
            steps=2,
            accumulate=1,
            on_step=lambda: None,
        )
        written.append(
            (tuning.mean_loss(batches), dict(tree_flatten(model.trainable_parameters())))
        )
    (loss, weights), (prefix_loss, prefix_weights) = written
    assert prefix_loss == pytest.approx(loss, rel=1e-3)
    for name, value in weights.items():
        assert mx.allclose(value, prefix_weights[name], atol=1e-4).item(), name


def test_a_model_with_other_caches_is_trained_without_a_shared_prefix(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "g", model_type="gemma3_text", extra=KINDS["gemma3_text"])
    model, tokenizer = load(path)
    assert not can_share_prefix(model)
    small = SmallModel(model, tokenizer, name="g")
    outcome = adapt(small, tmp_path / "a", epochs=1)
    assert outcome.best is not None


def test_every_example_is_in_one_batch_and_an_epoch_has_all_batches() -> None:
    examples = [answer_example([1] * (n + 1), [2, 3]) for n in range(11)]
    batches = make_batches(examples, 4)
    assert [batch[0].shape[0] for batch in batches] == [4, 4, 3]
    assert sum(batch[3].sum().item() for batch in batches) == 22
    stream, later = shuffled_batches(batches), shuffled_batches(batches, skip=4)
    epochs = [next(stream) for _ in range(9)]
    for begin in (0, 3, 6):
        assert {id(batch) for batch in epochs[begin : begin + 3]} == set(map(id, batches))
    assert [id(next(later)) for _ in range(5)] == [id(batch) for batch in epochs[4:]]


def test_one_answer_in_five_is_held_out_and_repeated_prompts_are_used_once(
    small: SmallModel,
) -> None:
    answers = worked_answers(small, 20)
    end = min(small.vocabulary.eos_ids)
    withheld = [
        replace(item, answer=LargeAnswer((end,), (0,), (0.0,), ((),)))
        for item in worked_answers(small, 30)[20:]
    ]
    trained, held_out = split_answers(small, [*answers, *answers, *withheld])
    assert (len(trained), len(held_out)) == (16, 4)
    assert not {a.question.prompt for a in trained} & {a.question.prompt for a in held_out}
    with pytest.raises(UsageError, match="at least 10 different questions, not 9"):
        split_answers(small, [*answers[:9], *answers[:9]])


@pytest.mark.parametrize(
    ("counts", "held_out_of_files"),
    [
        ((300, 200), [60, 40]),
        ((250, 251), [50, 50]),
        ((500, 500), [50, 50]),
        ((900, 100), [90, 10]),
    ],
)
def test_held_out_questions_are_of_all_files(
    counts: tuple[int, int], held_out_of_files: list[int], small: SmallModel
) -> None:
    answers = worked_answers(small, sum(counts))
    trained, held_out = split_answers(small, answers)
    assert (len(held_out), len(trained)) == (100, sum(counts) - 100)
    first = {item.question.fingerprint for item in answers[: counts[0]]}
    in_first = sum(item.question.fingerprint in first for item in held_out)
    assert [in_first, len(held_out) - in_first] == held_out_of_files
    if sum(counts) <= 500:
        assert held_out == answers[::5]


def test_questions_of_an_earlier_training_are_not_held_out_if_enough_are_new(
    small: SmallModel,
) -> None:
    answers = worked_answers(small, 30)
    names = [item.question.fingerprint for item in answers]
    trained, held_out = split_answers(small, answers, known=set(names[:20]))
    assert [item.question.fingerprint for item in held_out] == [names[20], names[25]]
    assert len(trained) == 28
    few_new = split_answers(small, answers, known=set(names[:21]))
    assert few_new == split_answers(small, answers)


def test_answers_that_the_question_proves_wrong_are_not_trained_on(small: SmallModel) -> None:
    answers = worked_answers(small, 25)
    wrong = [
        replace(item, question=replace(item.question, answer="quick fox"))
        for item in answers[1::5] + answers[:1]
    ]
    others = [item for number, item in enumerate(answers) if number % 5 != 1 and number]
    trained, held_out = split_answers(small, [*wrong, *others])
    assert (len(trained), len(held_out)) == (16, 5)
    assert {item.question.answer for item in trained} == {"lazy dog"}
    # What is right is not known: all are trained on.
    unknown = [replace(item, question=replace(item.question, answer=None)) for item in wrong]
    assert len(split_answers(small, [*unknown, *others])[0]) == 20
    with pytest.raises(UsageError, match=r"only 6 of .* 10 answers .* are right.* leave it out"):
        split_answers(small, [*wrong, *others[:7]])
    # Of ten questions two are held out, and all others have to be right.
    with pytest.raises(UsageError, match=r"7 of .* 8 answers .* are right; at least 8 are needed"):
        split_answers(small, [*others[:9], wrong[0]])


# Training


def test_the_learning_rate_rises_and_falls(small: SmallModel) -> None:
    tuning = LoraTuning(small.model, LoraShape(rank=2, layers=1), learning_rate=1.0)

    def rates(updates: int, done: int) -> list[float]:
        tuning.schedule(updates, done=done)
        optimizer, rates = tuning._optimizer, []
        for _ in range(done, updates):
            optimizer.apply_gradients({"w": mx.zeros(1)}, {"w": mx.zeros(1)})
            rates.append(optimizer.learning_rate.item())
        return rates

    whole = rates(40, 0)
    assert whole[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert whole[4:] == sorted(whole[4:], reverse=True)
    assert 0 < whole[-1] < 0.05
    # Adam's averages start anew, so the step size rises again.
    rise = [0.25, 0.5, 0.75, *[1.0] * 22]
    assert rates(40, 15) == pytest.approx([a * b for a, b in zip(rise, whole[15:], strict=True)])
    assert rates(40, 39) == pytest.approx([0.25 * whole[39]])
    assert rates(1, 0) == [1.0]
    assert max(rates(500, 0)[:9]) < max(rates(500, 0)[:10]) == 1.0


def test_the_held_out_loss_falls_and_the_adapter_gives_it_again(
    small: SmallModel, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: value for name, value in tree_flatten(small.model.parameters())}
    outcome = adapt(small, tmp_path / "a")
    assert capsys.readouterr().out == ""
    first, best = outcome.figures[0], outcome.best
    assert best is not None
    assert best.loss < first.loss / 2
    assert (first.accuracy, best.accuracy) == (0.0, 1.0)
    after = dict(tree_flatten(small.model.parameters()))
    assert all(
        mx.array_equal(value, after[name.replace(".weight", ".linear.weight")]).item()
        for name, value in before.items()
        if "_proj" in name
    )
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {"adapters.safetensors", "adapter_config.json", "provenance.json"}
    provenance = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert provenance == outcome.report
    assert provenance["small"] == "tiny"
    assert provenance["answers"] == {"trained": 9, "held_out": 3}
    assert provenance["kept"]["loss"] == best.loss

    model, tokenizer = load(path, adapter=tmp_path / "a")
    adapted = SmallModel(model, tokenizer, name="adapted")
    _, held_out = split_answers(adapted, worked_answers(adapted, 12))
    batches = make_batches(make_examples(adapted, held_out), 8)
    tuning = LoraTuning(model, None, learning_rate=_RATE)
    assert tuning.mean_loss(batches) == pytest.approx(best.loss, rel=0.02, abs=1e-3)


def test_a_training_writes_no_weights_but_the_best(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mx.save_safetensors
    written: list[Path] = []

    def record(file: str, *arguments: dict[str, Any]) -> None:
        written.append(Path(file).parent)
        save(file, *arguments)

    monkeypatch.setattr(mx, "save_safetensors", record)
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []
    outcome = adapt(small, tmp_path / "a", epochs=1, on_step=steps.append)
    # Two batches, each judged.
    assert steps == [0, 1, 2]
    assert len(outcome.figures) == 3
    assert set(written) == {tmp_path / "a"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_an_adapter_is_trained_further(path: Path, small: SmallModel, tmp_path: Path) -> None:
    first = adapt(small, tmp_path / "a", epochs=1)
    assert first.best is not None
    model, tokenizer = load(path, adapter=tmp_path / "a")
    adapted = SmallModel(model, tokenizer, name="adapted")
    second = adapt(adapted, tmp_path / "b", epochs=1, start=tmp_path / "a")
    assert second.figures[0].loss == pytest.approx(first.best.loss, rel=0.02)
    assert second.best is not None
    assert second.best.loss < first.best.loss
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4
    load(path, adapter=tmp_path / "b")


def test_weights_of_a_file_are_trained_in_single_precision(path: Path) -> None:
    model, _ = load(path)
    LoraTuning(model, LoraShape(rank=2, layers=1), learning_rate=_RATE)
    # On a GPU the weights of an adapter stay in the precision of its file.
    model.update(tree_map(lambda w: w.astype(mx.float16), model.trainable_parameters()))
    LoraTuning(model, None, learning_rate=_RATE)
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert trained
    assert {weight.dtype for weight in trained.values()} == {mx.float32}


def test_a_quantised_model_is_tuned(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "q", quantized=True)
    model, tokenizer = load(path)
    small = SmallModel(model, tokenizer, name="q")
    outcome = adapt(small, tmp_path / "a", epochs=2)
    assert outcome.best is not None
    load(path, adapter=tmp_path / "a")


def test_quantised_layers_get_lora_weights() -> None:
    # On a Mac the weights stay quantised.
    layer = nn.QuantizedLinear(64, 64, bias=False, group_size=32, bits=4)
    model = nn.Module()
    model.layers = [nn.Module()]
    model.layers[0].proj = layer
    LoraTuning(model, LoraShape(rank=2, layers=1), learning_rate=_RATE)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"layers.0.proj.lora_a", "layers.0.proj.lora_b"}


@pytest.mark.parametrize("step", [1, 8])
def test_an_interrupt_keeps_the_best_weights(step: int, small: SmallModel, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    folder = tmp_path / "a"
    if step == 1:
        with pytest.raises(KeyboardInterrupt):
            adapt(small, folder, on_step=interrupt)
        assert not list(folder.iterdir())
        return
    outcome = adapt(small, folder, on_step=interrupt)
    assert outcome.ended_by == "interrupt"
    assert outcome.best == outcome.figures[-1]
    assert json.loads((folder / "provenance.json").read_text())["ended_by"] == "interrupt"


@pytest.mark.parametrize("written", [0, 1])
def test_an_interrupt_while_weights_are_written_keeps_those_before(
    written: int, small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = LoraTuning.write_weights, itertools.count()

    def write_or_interrupt(self: LoraTuning, file: Path) -> None:
        if next(calls) == written:
            raise KeyboardInterrupt
        write(self, file)

    monkeypatch.setattr(LoraTuning, "write_weights", write_or_interrupt)
    folder = tmp_path / "a"
    if not written:
        with pytest.raises(KeyboardInterrupt):
            adapt(small, folder)
        assert not list(folder.iterdir())
        return
    outcome = adapt(small, folder)
    assert outcome.ended_by == "interrupt"
    assert outcome.best == outcome.figures[-2]


@pytest.mark.parametrize("name", ["adapter_config.json", "provenance.json"])
def test_a_full_disk_leaves_no_adapter_without_its_provenance(
    name: str, small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        replace_file(path, data)

    monkeypatch.setattr(adaptation, "replace_file", write)
    with pytest.raises(OSError, match="No space left on device"):
        adapt(small, tmp_path / "a", epochs=1)
    assert not list((tmp_path / "a").iterdir())


def test_an_interrupted_training_goes_on_from_the_kept_weights(
    path: Path, small: SmallModel, tmp_path: Path
) -> None:
    def interrupt(done: int) -> None:
        # An epoch has three batches, and two of them are judged at a time.
        if done == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "a"
    answers = worked_answers(small, 24)
    first = adapt(small, folder, answers=answers, epochs=2, on_step=interrupt)
    report = json.loads((folder / "provenance.json").read_text())
    interrupted = InterruptedRun.from_report(report)
    assert interrupted is not None
    assert interrupted.best == first.best
    assert interrupted.figures == first.figures[:2]

    model, tokenizer = load(path, adapter=folder)
    steps: list[int] = []
    second = adapt(
        SmallModel(model, tokenizer, name="tiny"),
        folder,
        answers=answers,
        epochs=2,
        start=folder,
        interrupted=interrupted,
        on_step=steps.append,
    )
    assert steps == list(range(2, 7))
    assert second.figures[:2] == first.figures[:2]
    epochs = [figures.epoch for figures in second.figures]
    assert epochs == sorted(set(epochs))
    assert second.ended_by == "epochs"
    assert second.best is not None
    assert second.best.loss < first.figures[1].loss
    report = json.loads((folder / "provenance.json").read_text())
    assert InterruptedRun.from_report(report) is None


@pytest.mark.parametrize("is_earlier", [False, True])
def test_no_batch_of_many_is_skipped_or_repeated_after_an_interrupt(
    is_earlier: bool, small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(
        self: object, stream: object, *, steps: int, on_step: Callable[[], None], **_: object
    ) -> None:
        for _step in range(steps):
            on_step()

    def interrupt(done: int) -> None:
        if done == 241:
            raise KeyboardInterrupt

    losses = itertools.count(10, -1)
    monkeypatch.setattr(adaptation, "BATCH_SIZE", 1)
    monkeypatch.setattr(adaptation, "measure_accuracy", lambda *_, **__: 0.5)
    monkeypatch.setattr(LoraTuning, "mean_loss", lambda *_: float(next(losses)))
    monkeypatch.setattr(LoraTuning, "train", train)
    # An epoch has 239 batches, so the 240th ends epoch 1.004.
    answers = worked_answers(small, 299)
    folder = tmp_path / "a"
    first = adapt(small, folder, answers=answers, epochs=2, on_step=interrupt)
    assert first.best is not None
    assert (first.best.epoch, first.best.updates) == (1.0, 240)
    report = json.loads((folder / "provenance.json").read_text())
    if is_earlier:
        for figures in (*report["figures"], report["kept"]):
            del figures["updates"]
    begin = 239 if is_earlier else 240
    steps: list[int] = []
    adapt(
        small,
        folder,
        answers=answers,
        epochs=2,
        start=folder,
        interrupted=InterruptedRun.from_report(report),
        on_step=steps.append,
    )
    assert steps == list(range(begin, 479))


def test_an_interrupted_round_goes_on_with_the_next(
    path: Path, small: SmallModel, tmp_path: Path
) -> None:
    large = ScriptedLarge([(small.vocabulary.encode("y")[0],)])
    with RecordingLarge(large, tmp_path / "replies.jsonl") as recording:
        corrector = Corrector(recording, at_once=1)
        folder = tmp_path / "a"
        first = adapt(small, folder, epochs=1, rounds=1, corrector=corrector)
        assert first.best is not None
        assert first.best.round == 1
        report = {**first.report, "ended_by": "unfinished"}
        interrupted = InterruptedRun.from_report(report)
        model, tokenizer = load(path, adapter=folder)
        second = adapt(
            SmallModel(model, tokenizer, name="tiny"),
            folder,
            epochs=1,
            rounds=2,
            corrector=corrector,
            start=folder,
            interrupted=interrupted,
        )
    kept = first.figures.index(first.best)
    assert second.figures[: kept + 1] == first.figures[: kept + 1]
    assert {figures.round for figures in second.figures[kept + 1 :]} == {2}
    assert [item["round"] for item in second.report["corrections"]] == [1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LargeRefused("no")])
def test_a_round_that_ended_before_an_interrupt_is_not_trained_again(
    error: BaseException,
    path: Path,
    small: SmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The best weights of round 0 are not its last ones.
    losses = {0: iter([3.0, 2.0, 2.5]), 1: iter([4.0, 3.0, 3.5])}

    def judge(self: object, number: int, epoch: float, batches: object) -> HeldOutFigures:
        return HeldOutFigures(number, epoch, next(losses[number]), 0.5)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(adaptation._Training, "_judge", judge)
    folder = tmp_path / "a"
    large = ScriptedLarge([(small.vocabulary.encode("y")[0],)])
    with RecordingLarge(large, tmp_path / "replies.jsonl") as recording:
        corrector = Corrector(recording, at_once=1)
        with monkeypatch.context() as patch, suppress(LargeRefused):
            patch.setattr(Corrector, "correct_own_answers", fail)
            adapt(small, folder, epochs=1, rounds=1, corrector=corrector)
        report = json.loads((folder / "provenance.json").read_text())
        interrupted = InterruptedRun.from_report(report)
        assert interrupted is not None
        assert interrupted.best.loss == 2.0
        assert [item.loss for item in interrupted.figures] == [3.0, 2.0, 2.5]
        model, tokenizer = load(path, adapter=folder)
        second = adapt(
            SmallModel(model, tokenizer, name="tiny"),
            folder,
            epochs=1,
            rounds=1,
            corrector=corrector,
            start=folder,
            interrupted=interrupted,
        )
    assert second.figures[:3] == interrupted.figures
    assert [item.loss for item in second.figures[3:]] == [4.0, 3.0, 3.5]
    assert second.best == second.figures[4]
    assert second.ended_by == "epochs"
    assert interrupted.place == "after round 0"
    # A report of an earlier version does not say what has ended.
    del report["ended_rounds"]
    earlier = InterruptedRun.from_report(report)
    assert earlier is not None
    assert (earlier.ended_rounds, len(earlier.figures)) == (0, 2)
    assert earlier.place == "round 0 at epoch 0.5"


def test_an_interrupted_last_round_is_the_end(
    path: Path, small: SmallModel, tmp_path: Path
) -> None:
    large = ScriptedLarge([(small.vocabulary.encode("y")[0],)])
    with RecordingLarge(large, tmp_path / "replies.jsonl") as recording:
        corrector = Corrector(recording, at_once=1)
        folder = tmp_path / "a"
        first = adapt(small, folder, epochs=1, rounds=1, corrector=corrector)
        begun = [*first.report["corrections"], {"round": 2, "agreement": 1, "incomplete": 0}]
        report = {**first.report, "ended_by": "interrupt", "ended_rounds": 1, "corrections": begun}
        model, tokenizer = load(path, adapter=folder)
        second = adapt(
            SmallModel(model, tokenizer, name="tiny"),
            folder,
            epochs=1,
            rounds=1,
            corrector=corrector,
            start=folder,
            interrupted=InterruptedRun.from_report(report),
        )
    assert second.best == first.best
    assert second.ended_by == second.report["ended_by"] == "epochs"
    assert "ended_rounds" not in second.report
    assert [item["round"] for item in second.report["corrections"]] == [1]


@pytest.mark.parametrize("report", [{}, {"ended_by": "interrupt", "figures": 3}])
def test_what_is_not_a_training_report_is_refused(report: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a training report"):
        InterruptedRun.from_report(report)


@pytest.mark.parametrize(
    ("figures", "kept", "ended_by"),
    [
        ([(3, 0.5), (2, 0.5), (1, 0.5)], 2, "epochs"),
        ([(3, 0.5), (2, 0.5), (2.5, 0.5), (1, 0.5)], 3, "epochs"),
        ([(3, 0.8), (2, 0.5), (1, 0.8)], 2, "epochs"),
        ([(3, 0.5), (2, 0.5), (2.5, 0.5), (2.1, 0.5), (1, 0.5)], 1, "held-out loss"),
        ([(3, 0.5), (3, 0.5), (3.1, 0.5)], None, "held-out loss"),
        ([(3, 0.5), (2, 0.8), (1, 0.2), (0.5, 0.8)], 1, "held-out accuracy"),
        ([(3, 0.8), (2, 0.2)], None, "held-out accuracy"),
    ],
)
def test_held_out_figures_decide_when_to_stop(
    figures: list[tuple[float, float]],
    kept: int | None,
    ended_by: str,
    small: SmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = iter(figures)

    def judge(self: object, number: int, epoch: float, batches: object) -> HeldOutFigures:
        loss, accuracy = next(script)
        return HeldOutFigures(number, epoch, loss, accuracy)

    monkeypatch.setattr(adaptation._Training, "_judge", judge)
    epochs = len(figures) // 2 if ended_by == "epochs" else 4
    if ended_by == "epochs":
        # A half epoch is judged at a time.
        figures += [(9.0, 0.5)] * (2 * epochs + 1 - len(figures))
        script = iter(figures)
    outcome = adapt(small, tmp_path / "a", epochs=epochs)
    assert outcome.ended_by == ended_by
    assert outcome.best == (None if kept is None else outcome.figures[kept])
    assert (tmp_path / "a" / "adapters.safetensors").exists() == (kept is not None)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("count", [10, 12, 40, 70])
def test_no_answer_is_trained_on_more_often_than_the_epochs_say(
    count: int, epochs: int, small: SmallModel, tmp_path: Path
) -> None:
    outcome = adapt(small, tmp_path / "a", answers=worked_answers(small, count), epochs=epochs)
    assert outcome.figures[-1].epoch == epochs


def test_a_divergence_keeps_the_best_weights(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 1e30
    trained, held_out = split_answers(small, worked_answers(small, 12))
    options = TuningOptions(LoraShape(rank=2, layers=2), rate, 4, max_tokens=4)
    with pytest.raises(UsageError, match="the training diverged"):
        adapt_to_answers(small, trained, held_out, options, folder=tmp_path / "a", provenance={})
    assert not list((tmp_path / "a").iterdir())


def test_questions_without_an_outcome_of_the_large_model_are_not_judged(
    small: SmallModel, tmp_path: Path
) -> None:
    def ask_for_number(item: WorkedAnswer) -> WorkedAnswer:
        return replace(item, question=replace(item.question, kind=AnswerKind.NUMBER))

    answers = worked_answers(small, 12, gold=False)
    # The first one is held out; no text has a number.
    outcome = adapt(small, tmp_path / "a", answers=[ask_for_number(answers[0]), *answers[1:]])
    assert outcome.report["answers"] == {"trained": 9, "held_out": 3}
    assert outcome.report["unjudged"] == 1
    # Its own text has none either, and is not right for that.
    assert outcome.figures[0].accuracy == 0
    with pytest.raises(UsageError, match="give no final answer to the 3 held-out questions"):
        adapt(small, tmp_path / "b", answers=list(map(ask_for_number, answers)))


@pytest.mark.parametrize(
    ("kind", "text", "is_whole", "reference"),
    [
        (AnswerKind.NUMBER, "In May she sold 48/2 = 24", False, None),
        (AnswerKind.NUMBER, "In May she sold 48/2 = 24", True, "24"),
        (AnswerKind.NUMBER, "In all \\boxed{72}. Check: 48", False, "72"),
        # The small model's own text is cut off at the same length.
        (AnswerKind.TEXT, "the lazy", False, "the lazy"),
    ],
)
def test_an_outcome_that_the_rest_of_an_answer_could_change_judges_nothing(
    kind: AnswerKind, text: str, is_whole: bool, reference: str | None, small: SmallModel
) -> None:
    (plain,) = worked_answers(small, 1, gold=False)
    token_ids = small.vocabulary.encode(text)
    if is_whole:
        token_ids = (*token_ids, small.vocabulary.end_id)
    answer = LargeAnswer(token_ids, tuple(range(len(token_ids))), (), ())
    item = replace(plain, question=replace(plain.question, kind=kind), answer=answer)
    judged = judge_answers(small, [item, plain], by_rows=False)
    references = [question.reference for question in judged]
    assert references == [*([] if reference is None else [reference]), "the lazy dog"]


# On-policy rounds


def test_the_large_model_corrects_own_answers(small: SmallModel, tmp_path: Path) -> None:
    conversation = question_messages(Question("q", "say"))
    (written,) = write_answers(small, [conversation], max_tokens=4)
    assert len(written) == 4
    end = min(small.vocabulary.eos_ids)
    other = 70 if written[1] != 70 else 71
    # It agrees, writes another token, agrees with the own token after that, and ends.
    large = ScriptedLarge([(written[0],), (other,), (written[2],), (end,)])
    with RecordingLarge(large, tmp_path / "replies.jsonl") as recording:
        corrector = Corrector(recording, at_once=1)
        corrections = corrector.correct_own_answers(
            small, [conversation], max_tokens=4, progress=no_progress
        )
    (example,) = corrections.examples
    assert example is not None
    assert corrections.agreement == 0.5
    assert corrections.incomplete == 0
    prompt_ids = small.encode_conversation(conversation).ids
    assert example.prompt_ids == prompt_ids
    assert example.token_ids == (*prompt_ids, *written[:3])
    own_end = small.vocabulary.end_id
    assert example.targets == tuple(map(one_token, (written[0], other, written[2], own_end)))
    asked = [tuple(context.token_ids) for context in large.contexts]
    assert asked == [(*prompt_ids, *written[:count]) for count in range(4)]


@pytest.mark.parametrize("count", [0, 2])
def test_an_answer_that_the_server_cannot_continue_is_used_up_to_there(
    count: int, small: SmallModel, tmp_path: Path
) -> None:
    conversation = question_messages(Question("q", "say"))
    (written,) = write_answers(small, [conversation], max_tokens=4)
    refusal = LargeProtocolError("it did not continue the answer")
    large = ScriptedLarge([*((token_id,) for token_id in written[:count]), refusal])
    with RecordingLarge(large, tmp_path / "replies.jsonl") as recording:
        corrections = Corrector(recording, at_once=1).correct_own_answers(
            small, [conversation], max_tokens=4, progress=no_progress
        )
    (example,) = corrections.examples
    assert (example is None) == (count == 0)
    assert example is None or example.targets == tuple(map(one_token, written[:count]))
    assert corrections.incomplete == 1


def test_a_failing_server_ends_the_corrections(small: SmallModel, tmp_path: Path) -> None:
    large = ScriptedLarge([LargeRefused("no")])
    conversation = question_messages(Question("q", "say"))
    with (
        RecordingLarge(large, tmp_path / "replies.jsonl") as recording,
        pytest.raises(LargeRefused),
    ):
        Corrector(recording, at_once=1).correct_own_answers(
            small, [conversation], max_tokens=4, progress=no_progress
        )


def test_on_policy_rounds_start_from_the_best_weights(small: SmallModel, tmp_path: Path) -> None:
    # The large model writes `q` everywhere.
    token_id = small.vocabulary.encode("q")[0]
    large = ScriptedLarge([(token_id,)])
    with RecordingLarge(large, tmp_path / "replies.jsonl", at_once=2) as recording:
        corrector = Corrector(recording, at_once=2)
        outcome = adapt(small, tmp_path / "a", epochs=1, rounds=2, corrector=corrector)
    assert {figures.round for figures in outcome.figures} >= {0, 1}
    assert outcome.best is not None
    assert outcome.best.round >= 1
    assert large.contexts
    provenance = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert provenance["kept"]["round"] == outcome.best.round
    agreements = [item["agreement"] for item in provenance["corrections"]]
    assert agreements[0] < 1


def test_own_answers_to_questions_of_another_form_keep_their_prompts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss with a shared prefix is that without, though one prompt does not begin so."""
    losses = []
    for name in ("shared", "alone"):
        small = SmallModel(*load(path), name="tiny")
        first, *others = worked_answers(small, 12)
        # The large model's own answer to it is wrong, so only the corrected one is judged.
        question = replace(first.question, answer="quick fox")
        conversation = [{"role": "system", "content": "the naïve café"}, *first.conversation]
        odd = replace(first, question=question, conversation=conversation)
        large = ScriptedLarge([(small.vocabulary.encode("y")[0],)])
        with RecordingLarge(large, tmp_path / f"{name}.jsonl") as recording:
            outcome = adapt(
                small,
                tmp_path / name,
                answers=[odd, *others],
                epochs=1,
                rounds=1,
                corrector=Corrector(recording, at_once=1),
            )
        losses.append(next(item.loss for item in outcome.figures if item.round == 1))
        monkeypatch.setattr(adaptation, "can_share_prefix", lambda model: False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# Memory


def test_fewer_answers_are_read_at_once_where_little_memory_is_free(
    small: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples(small, worked_answers(small, 12))
    prefix = len(find_common_prefix(examples))
    longest = max(make_batches([item.without(prefix)], 1)[0][0].size for item in examples)
    monkeypatch.setattr(
        LoraTuning, "measure_bytes", lambda self, batch: 100 * (prefix + batch[0].size)
    )
    monkeypatch.setattr(memory, "available_bytes", lambda: 125 * int(prefix + 2.5 * longest))
    outcome = adapt(small, tmp_path / "a", epochs=1)
    assert outcome.report["read_at_once"] == 2
    assert outcome.best is not None
    monkeypatch.setattr(memory, "available_bytes", lambda: 125 * int(prefix + 0.9 * longest))
    with pytest.raises(NotEnoughSpace, match="choose a smaller model"):
        adapt(small, tmp_path / "b", epochs=1)


def test_a_step_takes_memory(small: SmallModel) -> None:
    tuning = LoraTuning(small.model, LoraShape(rank=2, layers=1), learning_rate=_RATE)
    (batch,) = make_batches([answer_example([5] * 100, [6] * 100)], 1)
    assert tuning.measure_bytes(batch) > 4 * 100 * small.vocabulary.size
