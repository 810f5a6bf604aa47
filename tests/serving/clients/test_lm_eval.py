"""lm-eval: the answers it gets are those of `bench quality`, and it gets likelihoods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxroute import LargeModel
from mlxroute.bench.delayed_server import DelayedServer
from mlxroute.bench.quality.graded_answers import QualityResults
from mlxroute.bench.quality.question_runs import bench_quality
from mlxroute.bench.quality.sides import SMALL, QualitySide
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.questions.question_files import Question, question_messages, read_questions
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from tests.conftest import CACHE_DIR
from tests.serving.clients.endpoint_process import run_server
from tests.serving.clients.installation import python_client, run_client

pytestmark = pytest.mark.heavy

_MODEL = "smollm2-135m"
_PAIR = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
_ROUTED = QualitySide("routed", "entropy", 0.1)
_QUESTIONS = 20
_TOKENS = 24
# Calls make the routed answers slow.
_ROUTED_TOKENS = 12
_SHARED = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
_TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
_GENERATED = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["Question:"]
  do_sample: false
metric_list:
  - metric: exact_match
"""
_CHOSEN = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


class _NoReplies:
    """In place of the large model, which the small model's own answers do not ask."""

    model_name = recorded_name = "none"
    calls_s = 0.0

    def new_view(self, **options: object) -> _NoReplies:
        return self

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return read_questions(_SHARED / "test.jsonl")[:_QUESTIONS]


def _bench_texts(
    small: SmallModel,
    recording: RecordingLarge,
    questions: Sequence[Question],
    path: Path,
    *,
    routed: QualitySide | None = None,
) -> dict[str, str]:
    """Return the small model's or the routed text to each prompt, as `bench quality` writes it."""
    sides = [SMALL] if routed is None else [SMALL, routed]
    bench_quality(
        small,
        recording,
        questions,
        sides=sides,
        examples=(),
        ranks=ScoreRanks.find(small.name, path.parent),
        max_tokens=_TOKENS if routed is None else _ROUTED_TOKENS,
        step_s=0.1,
        results=QualityResults(path),
        # Each question is a chat of its own, as each request to the endpoint is.
        chats=len(questions),
    )
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    # All sides answer a question before the next one.
    rows = [json.loads(line)["row"] for line in lines[len(sides) - 1 :: len(sides)]]
    assert bool(sum(row["escalated"] for row in rows)) == (routed is not None)
    texts = {row["question"]: row["text"] for row in rows}
    return {_prompt(question): texts[question.name] for question in questions}


@pytest.fixture(scope="module")
def small_texts(
    questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return the small model's own texts by prompt."""
    small = SmallModel.load(_MODEL, cache_dir=CACHE_DIR)
    path = tmp_path_factory.mktemp("bench") / "answers.jsonl"
    return _bench_texts(small, _NoReplies(), questions, path)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def large_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A large model that answers a request that it had before as it did then."""
    folder = tmp_path_factory.mktemp("large")
    with (
        run_server(folder, "host", _PAIR[1]) as upstream,
        DelayedServer(upstream, record=folder / "replies.jsonl") as server,
    ):
        yield server.url


@pytest.fixture(scope="module")
def routed_texts(
    questions: list[Question], large_address: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return the routed texts by prompt."""
    folder = tmp_path_factory.mktemp("routed-bench")
    small = SmallModel.load(_PAIR[0], cache_dir=CACHE_DIR)
    with LargeModel(large_address, timeout_s=600) as large:
        large.connect(thorough=False)
        large.pair_vocabulary(small.vocabulary)
        with RecordingLarge(large, folder / "replies.jsonl") as recording:
            path = folder / "answers.jsonl"
            return _bench_texts(small, recording, questions, path, routed=_ROUTED)


@pytest.fixture(scope="module")
def routed_endpoint(
    routed_texts: dict[str, str], large_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The endpoint of the pair, with the budget and the mode of `bench quality`."""
    flags = ("--small", _PAIR[0], "--large", large_address, "--budget", str(_ROUTED.budget))
    mode = ("--mode", "wait", "--prefetch", "0", "--timeout", "600", "--port", "0")
    with run_server(tmp_path_factory.mktemp("routed"), "serve", *flags, *mode) as address:
        yield address


def _prompt(question: Question) -> str:
    return question_messages(question)[-1]["content"]


def _run(
    folder: Path,
    home: Path,
    *flags: str,
    rows: list[dict[str, Any]],
    task: str,
    model: str,
    model_args: str,
) -> list[dict[str, Any]]:
    """Run lm-eval on one task; return its samples."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = _TASK.format(task="serve_task", rows=data) + task
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    run_client(
        [
            *(python_client("lm-eval", "lm-eval"), "run", "--tasks", "serve_task"),
            *("--include_path", folder, "--model", model, "--model_args", model_args),
            *("--output_path", folder / "out", "--log_samples", *flags),
        ],
        home,
        HF_HUB_OFFLINE="1",
    )
    (path,) = (folder / "out").rglob("samples_*.jsonl")
    lines = path.read_bytes().split(b"\n")
    samples: list[dict[str, Any]] = [json.loads(line) for line in lines if line]
    assert len(samples) == len(rows)
    return samples


def _model_args(address: str, path: str, **more: str | int) -> str:
    values = {"base_url": f"{address}/{path}", **more}
    return ",".join(f"{key}={value}" for key, value in values.items())


def _tokenizer(model: str) -> dict[str, str]:
    folder = CACHE_DIR / "models" / model
    return {"tokenizer_backend": "huggingface", "tokenizer": str(folder)}


def _ask_questions(
    kind: str, address: str, model: str, questions: Sequence[Question], folder: Path, home: Path
) -> dict[str, str]:
    """Return the texts that lm-eval gets, by prompt."""
    name, tokens = ("mlxroute:small", _TOKENS) if model == _MODEL else ("mlxroute", _ROUTED_TOKENS)
    common: dict[str, str | int] = {"model": name, "max_gen_toks": tokens, "timeout": 600}
    if kind == "chat":
        flags = ["--apply_chat_template"]
        args = _model_args(address, "chat/completions", **common)
    else:
        # lm-eval applies the chat template itself and sends token ids, two prompts a request.
        flags = ["--apply_chat_template", "--batch_size", "2"]
        args = _model_args(address, "completions", **common, **_tokenizer(model))
    client = "local-chat-completions" if kind == "chat" else "local-completions"
    rows = [{"prompt": _prompt(question), "answer": question.answer} for question in questions]
    samples = _run(folder, home, *flags, rows=rows, task=_GENERATED, model=client, model_args=args)
    return {sample["doc"]["prompt"]: sample["resps"][0][0] for sample in samples}


@pytest.mark.parametrize("kind", ["chat", "token-ids"])
def test_gsm8k_answers_are_those_of_bench_quality(
    kind: str,
    local_endpoint: str,
    questions: list[Question],
    small_texts: dict[str, str],
    home: Path,
    tmp_path: Path,
) -> None:
    texts = _ask_questions(kind, local_endpoint, _MODEL, questions, tmp_path, home)
    assert texts == small_texts


@pytest.mark.parametrize("kind", ["chat", "token-ids"])
def test_routed_gsm8k_answers_are_those_of_bench_quality(
    kind: str,
    routed_endpoint: str,
    questions: list[Question],
    routed_texts: dict[str, str],
    home: Path,
    tmp_path: Path,
) -> None:
    texts = _ask_questions(kind, routed_endpoint, _PAIR[0], questions, tmp_path, home)
    assert texts == routed_texts


def test_likelihoods_choose_the_likelier_ending(
    local_endpoint: str, home: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "One, two,", "choices": [" three", " banana"]},
        {"prompt": "Paris is the capital of", "choices": [" France", " Peru"]},
    ]
    args = _model_args(local_endpoint, "completions", model="mlxroute:small", **_tokenizer(_MODEL))
    samples = _run(
        tmp_path, home, rows=rows, task=_CHOSEN, model="local-completions", model_args=args
    )
    assert [sample["acc"] for sample in samples] == [1, 1]
