"""Labels, and heads fitted to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from mlxroute.backend.load import load
from mlxroute.cli import main
from mlxroute.engine import generate
from mlxroute.errors import LargeError, LargeRefused, UsageError, WeightsError
from mlxroute.questions import Question
from mlxroute.ranks import Ranks
from mlxroute.routers import make
from mlxroute.small import SmallModel
from mlxroute.training import collect, fit
from mlxroute.training.fit import recall
from mlxroute.training.labels import Labelled
from tests.fakes import Reply, ScriptedLarge
from tests.tiny import make_tiny_model

_HIDDEN = 64
_QUESTIONS = [Question(str(i), f"say {i}") for i in range(3)]


class Named(ScriptedLarge):
    """A scripted large model with a name."""

    model_name = "scripted"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


def synthetic(count: int, *, seed: int = 0) -> list[Labelled]:
    """Answers in which one direction of the state says where the models differ."""
    key = mx.random.key(seed)
    found = []
    for each in mx.random.split(key, count):
        hidden = mx.random.normal((40, _HIDDEN), key=each)
        signals = mx.abs(mx.random.normal((40, 4), key=mx.random.split(each)[0]))
        differs = (hidden[:, 3] > 1.2).astype(mx.float32)
        found.append(Labelled(hidden.astype(mx.float16), signals, differs))
    return found


# Labels


def test_labels_say_where_the_small_model_would_have_written_otherwise(
    small: SmallModel, tmp_path: Path
) -> None:
    ids = small.encode_prompt(small.render([{"role": "user", "content": "say 0"}]))
    signals, _ = small.prefill(ids)
    own = signals.token_id
    other = 70 if own != 70 else 71
    # Agrees, then differs, then ends: what the small model wants then is its own matter.
    large = Named([(own,), (other,), (70,), (70,)])
    (labelled,) = collect(small, large, _QUESTIONS[:1], tokens=4, folder=tmp_path)
    assert labelled.hidden.shape == (4, _HIDDEN)
    differs = cast("list[float]", labelled.differs.tolist())
    assert differs[0] == 0
    first, _ = small.prefill(ids)
    assert mx.allclose(labelled.hidden[0], small.hidden_state(), atol=1e-2).item()
    assert labelled.signals[0].tolist() == pytest.approx(
        [first.entropy_nats, first.varentropy, first.top_logprobs[0], first.margin], rel=1e-5
    )
    second = small.step(own)
    assert differs[1] == float(second.token_id != other)
    assert mx.allclose(labelled.hidden[1], small.hidden_state(), atol=1e-2).item()


def test_what_is_labelled_is_not_asked_again_and_survives_a_fault(
    small: SmallModel, tmp_path: Path
) -> None:
    replies: list[Reply] = [(70,)] * 5
    with pytest.raises(LargeError):
        collect(small, Named([*replies, LargeRefused("no")]), _QUESTIONS, tokens=4, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    large = Named([(70,)])
    whole = collect(small, large, _QUESTIONS, tokens=4, folder=tmp_path)
    assert (len(whole), len(large.contexts)) == (3, 8)
    again = collect(small, silent := Named([(70,)]), _QUESTIONS, tokens=4, folder=tmp_path)
    assert silent.contexts == []
    assert all(mx.array_equal(a.hidden, b.hidden) for a, b in zip(whole, again, strict=True))


# Fitting


def test_a_head_finds_what_tells_the_models_apart(tmp_path: Path) -> None:
    fitted = fit(synthetic(60), about={"small": "s"})
    rows = fitted.report["recall"]
    assert rows["0.1"]["head"] > 0.7
    assert rows["0.1"]["entropy"] < 0.3
    assert rows["0.1"]["oracle"] >= rows["0.1"]["head"]
    assert fitted.report["answers"] == {"fitted": 48, "held_out": 12}
    assert list(fitted.quantiles) == sorted(fitted.quantiles)
    assert fit(synthetic(60), about={"small": "s"}).report == fitted.report


def test_a_written_head_scores_as_the_fitted_one_inside_a_step(
    small: SmallModel, tmp_path: Path
) -> None:
    fitted = fit(synthetic(20), about={})
    fitted.write(tmp_path / "h.safetensors")
    quantiles = small.load_head(tmp_path / "h.safetensors")
    assert quantiles == fitted.quantiles
    signals, _ = small.prefill(small.encode_prompt("hello"))
    own = [signals.entropy_nats, signals.varentropy, signals.top_logprobs[0], signals.margin]
    inputs = mx.concatenate([small.hidden_state().astype(mx.float32), mx.array(own)])[None]
    assert signals.head_score == pytest.approx(fitted.head.of(inputs).item(), rel=1e-3, abs=1e-3)
    answer = generate(
        small,
        None,
        "hi",
        router=make("head", budget=0.1, quantiles=quantiles),
        max_tokens=4,
    )
    assert all(math.isfinite(token.score) for token in answer)
    small.set_head(None)


def test_a_head_without_ranks_starts_budgets_anywhere(small: SmallModel, tmp_path: Path) -> None:
    file = tmp_path / "h.safetensors"
    fit(synthetic(20), about={}).write(file)
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), arrays)
    quantiles = small.load_head(tmp_path / "plain.safetensors")
    ranks = Ranks.of("tiny", tmp_path).knowing("head", quantiles)
    assert make("head", budget=0.1, quantiles=ranks["head"]).pace.threshold > 0
    mx.save_safetensors(str(tmp_path / "broken.safetensors"), arrays, {"quantiles": "["})
    with pytest.raises(WeightsError, match="broken metadata"):
        small.load_head(tmp_path / "broken.safetensors")
    small.set_head(None)


def test_too_little_to_learn_from_is_said() -> None:
    with pytest.raises(UsageError, match="at least 10 answers, not 9"):
        fit(synthetic(9), about={})
    same = [Labelled(a.hidden, a.signals, mx.zeros(40)) for a in synthetic(20)]
    with pytest.raises(UsageError, match="nothing to learn"):
        fit(same, about={})


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
    assert main(["ask", "--router", "head", "--budget", "7%", "hi"]) == 2
    assert "needs --head FILE" in capsys.readouterr().err
    ask = ["ask", "--offline", "--small", str(tiny), "--router", "head", "--budget", "7%"]
    assert main([*ask, "--head", head, "hi"]) == 2
    assert "cannot be read" in capsys.readouterr().err
