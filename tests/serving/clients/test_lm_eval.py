"""lm-eval: the answers it gets are those of `bench quality`, and it gets likelihoods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxroute.bench.quality import SMALL, QualityResults, bench_quality
from mlxroute.questions.question_files import Question, question_messages, read_questions
from mlxroute.small import SmallModel
from tests.conftest import CACHE_DIR
from tests.serving.clients.installation import python_client, run_client

pytestmark = pytest.mark.heavy

_MODEL = "smollm2-135m"
_QUESTIONS = 20
_TOKENS = 8
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

    model_name = "none"
    calls_s = 0.0

    def new_view(self) -> _NoReplies:
        return self

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return read_questions(_SHARED / "test.jsonl")[:_QUESTIONS]


@pytest.fixture(scope="module")
def bench_texts(
    questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return the text of the small model's answer to each prompt, as `bench quality` writes it."""
    path = tmp_path_factory.mktemp("bench") / "answers.jsonl"
    bench_quality(
        SmallModel.load(_MODEL, cache_dir=CACHE_DIR),
        _NoReplies(),  # type: ignore[arg-type]
        questions,
        sides=[SMALL],
        examples=(),
        ranks={},  # type: ignore[arg-type]
        max_tokens=_TOKENS,
        step_s=0.1,
        results=QualityResults(path),
    )
    rows = [
        json.loads(line)["row"] for line in path.read_text(encoding="utf-8").split("\n") if line
    ]
    texts = {row["question"]: row["text"] for row in rows}
    return {_prompt(question): texts[question.name] for question in questions}


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
    values = {"base_url": f"{address}/{path}", "model": "mlxroute:small", **more}
    return ",".join(f"{key}={value}" for key, value in values.items())


def _tokenizer() -> str:
    return str(CACHE_DIR / "models" / _MODEL)


@pytest.mark.parametrize("kind", ["chat", "token-ids"])
def test_gsm8k_answers_are_those_of_bench_quality(
    kind: str,
    local_endpoint: str,
    questions: list[Question],
    bench_texts: dict[str, str],
    home: Path,
    tmp_path: Path,
) -> None:
    if kind == "chat":
        model = "local-chat-completions"
        args = _model_args(local_endpoint, "chat/completions", max_gen_toks=_TOKENS)
    else:
        # lm-eval applies the chat template itself and sends token ids, two prompts a request.
        model = "local-completions"
        args = _model_args(
            local_endpoint,
            "completions",
            max_gen_toks=_TOKENS,
            tokenizer_backend="huggingface",
            tokenizer=_tokenizer(),
        )
    flags = ["--apply_chat_template", *(["--batch_size", "2"] if kind == "token-ids" else [])]
    rows = [{"prompt": _prompt(question), "answer": question.answer} for question in questions]
    samples = _run(tmp_path, home, *flags, rows=rows, task=_GENERATED, model=model, model_args=args)
    texts = {sample["doc"]["prompt"]: sample["resps"][0][0] for sample in samples}
    assert texts == bench_texts


def test_likelihoods_choose_the_likelier_ending(
    local_endpoint: str, home: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "One, two,", "choices": [" three", " banana"]},
        {"prompt": "Paris is the capital of", "choices": [" France", " Peru"]},
    ]
    args = _model_args(
        local_endpoint, "completions", tokenizer_backend="huggingface", tokenizer=_tokenizer()
    )
    samples = _run(
        tmp_path, home, rows=rows, task=_CHOSEN, model="local-completions", model_args=args
    )
    assert [sample["acc"] for sample in samples] == [1, 1]
