"""The client against the real `mlx_lm.server`: greedy tokens, and a server that stays alive."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from rich.console import Console

from mlxroute import EntropyRouter, generate
from mlxroute.backend.load import load
from mlxroute.catalog import Catalog, Pair
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import demo_story
from mlxroute.cli.routing import RoutingRule
from mlxroute.cli.session import Session
from mlxroute.config import Settings
from mlxroute.errors import LargeTimeout
from mlxroute.hosting.launcher import LocalServer
from mlxroute.large import LargeModel
from mlxroute.large.http import circuit_breaker
from mlxroute.ledger import Ledger
from mlxroute.questions.demo_question import DemoQuestion
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.recorded.large_answers import write_large_answers
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.types import (
    LargeContext,
    Mode,
    Source,
    StopReason,
    Vocabulary,
    no_notice,
    no_progress,
)
from mlxroute.user_folders import cache_folder
from mlxroute.weights import resolve
from tests.support.tiny import make_tiny_model, teach_days

PROMPTS = ["the lazy dog", "def main():", "answers everything"]
STEPS = 60


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory with its vocabulary and its own greedy answers."""

    path: Path
    vocabulary: Vocabulary
    greedy: dict[str, tuple[int, ...]]

    def context(self, prompt: str, count: int) -> LargeContext:
        ids = self.greedy[prompt][:count]
        whole = count
        while not _is_text(self._data(ids[:whole])):
            whole -= 1
        text = prompt + self._data(ids[:whole]).decode()
        return LargeContext(text, (0, *ids), ids[whole:], self.vocabulary)

    def _data(self, ids: tuple[int, ...]) -> bytes:
        return b"".join(map(self.vocabulary.token_bytes, ids))


def _is_text(data: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        data.decode()
        return True
    return False


def load_model(path: Path, prompts: Sequence[str], *, steps: int) -> Model:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mlxroute.tokenizers.token_vocabulary import TokenVocabulary

    model, tokenizer = load(path)
    vocabulary = TokenVocabulary(tokenizer)
    greedy = {}
    for prompt in prompts:
        ids = mx.array(tokenizer.encode(prompt))
        answer = [int(token) for token, _ in generate_step(ids, model, max_tokens=steps)]
        ends = [i for i, token_id in enumerate(answer) if token_id in vocabulary.eos_ids]
        greedy[prompt] = tuple(answer[: ends[0]] if ends else answer)
    return Model(path, vocabulary, greedy)


def speak_ascii_bytes(path: Path) -> None:
    """Make a tiny model write single ASCII bytes only, and its tokenizer read nothing longer.

    So every text has one tokenisation, and no answer ends or stops inside a character.
    """
    import mlx.core as mx

    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    scale = [0.0] * len(vocabulary)
    for piece, token_id in vocabulary.items():
        scale[token_id] = float(len(piece) == 1 and piece.isascii())
    weights: dict[str, mx.array] = mx.load(str(path / "model.safetensors"))  # type: ignore[assignment]
    name = "lm_head.weight"
    # A row of zeros has logit 0, and the largest of many is above that.
    weights[name] = weights[name] * mx.array(scale)[:, None]
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = make_tiny_model(tmp_path_factory.mktemp("large") / "tiny", seed=3, tied=False)
    speak_ascii_bytes(path)
    teach_days(path)
    return load_model(path, PROMPTS, steps=STEPS)


@contextlib.contextmanager
def stock_server(path: Path, *, hub_cache: Path) -> Iterator[str]:
    """`mlx_lm.server` as its users start it; yields the base of its routes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", "--model", str(path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A hub cache that does not exist makes the server break its own /v1/models.
        env=os.environ | {"HF_HUB_CACHE": str(hub_cache)},
    )
    try:
        root = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(requests.RequestException):
                requests.get(f"{root}/health", timeout=5)
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield f"{root}/v1"
    finally:
        process.kill()
        process.wait()


def generates(url: str) -> bool:
    body = {"prompt": "the", "max_tokens": 1}
    with contextlib.suppress(requests.RequestException):
        return requests.post(f"{url}/completions", json=body, timeout=60).status_code == 200
    return False


@pytest.fixture(scope="module")
def stock_url(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """Return a function that gives the address of a stock server; a new one after a crash."""
    hub_cache = tmp_path_factory.mktemp("stock") / "none"
    urls: list[str] = []
    with contextlib.ExitStack() as running:

        def find() -> str:
            if not urls or not generates(urls[-1]):
                running.close()
                urls.append(running.enter_context(stock_server(tiny.path, hub_cache=hub_cache)))
            return urls[-1]

        yield find


@pytest.fixture(scope="module")
def hosted(
    tiny: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], LocalServer]]:
    """Return a function that gives a server of `mlxroute host`; a new one after a kill."""
    folder = tmp_path_factory.mktemp("hosted")
    servers: list[LocalServer] = []
    with contextlib.ExitStack() as running:

        def find() -> LocalServer:
            if not servers or not generates(servers[-1].url):
                launched = LocalServer.launch(
                    tiny.path, cache_dir=folder / "cache", log_path=folder / "host.log"
                )
                servers.append(running.enter_context(launched))
                launched.wait_until_ready()
            return servers[-1]

        yield find


def escalate_along_answers(large: LargeModel, model: Model, *, calls: int, seed: int) -> None:
    """Escalate along the model's own greedy answers, the small model agreeing in between."""
    chance = random.Random(seed)
    made = 0
    while made < calls:
        prompt = chance.choice(list(model.greedy))
        answer, position = model.greedy[prompt], 0
        while position < len(answer) and made < calls:
            token = large.next_token(model.context(prompt, position))
            assert token.token_ids == (answer[position],)
            made += 1
            position += 1 + chance.choice([0, 0, 1, 1, 2, 3, 5])


def test_answers_are_written_at_once_as_they_are_one_by_one(
    tiny: Model, stock_url: Callable[[], str], tmp_path: Path
) -> None:
    conversations = [
        question_messages(Question(str(number), f"Count to {number}.")) for number in range(6)
    ]
    small = SmallModel(*load(tiny.path), name="tiny")
    url = stock_url()
    with LargeModel(url) as large:
        large.connect()
        answers = []
        for at_once in (1, 4):
            record = tmp_path / f"{at_once}.jsonl"
            with RecordingLarge(large, record, at_once=at_once) as recording:
                answers.append(
                    write_large_answers(
                        small,
                        recording,
                        conversations,
                        max_tokens=16,
                        at_once=at_once,
                        on_answer=lambda: None,
                    )
                )
        assert answers[0] == answers[1]
        whole = large.whole_chat(timeout_s=60).answer(conversations[0], max_tokens=8)
        assert (whole.completion_tokens, whole.ends) == (8, False)
        assert len({answer.token_ids for answer in answers[0]}) > 1
        assert generates(url)


def test_calls_along_its_own_answers_leave_the_server_alive(
    tiny: Model, stock_url: Callable[[], str]
) -> None:
    url = stock_url()
    with LargeModel(url) as large:
        assert "mlx_lm completions" in large.connect()
        escalate_along_answers(large, tiny, calls=60, seed=1)
        abandon(large, tiny)
    assert generates(url)
    # Without the guard the same prompts do crash this server.
    prompt = PROMPTS[0]
    for count in range(3):
        text = tiny.context(prompt, count).text
        body = {"prompt": text, "max_tokens": 1}
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{url}/completions", json=body, timeout=60)
    assert not generates(url)


def abandon(large: LargeModel, model: Model) -> None:
    """Time out calls, so that their cached sequences are unknown; then ask after them."""
    prompt = PROMPTS[1]
    for start in (20, 30, 40):
        with pytest.raises(LargeTimeout):
            large.next_token(model.context(prompt, start), deadline_s=0.0005)
        time.sleep(0.3)
        token = large.next_token(model.context(prompt, start + 2))
        assert token.token_ids == (model.greedy[prompt][start + 2],)


def test_the_launched_server_survives_prompts_it_has_cached(
    tiny: Model, hosted: Callable[[], LocalServer]
) -> None:
    url = hosted().url
    for count in range(12):
        text = tiny.context(PROMPTS[0], count).text
        body = {"prompt": text, "max_tokens": 1, "logprobs": True}
        reply = requests.post(f"{url}/completions", json=body, timeout=60).json()
        content = reply["choices"][0]["logprobs"]["content"]
        assert content[0]["id"] == tiny.greedy[PROMPTS[0]][count]


def test_one_model_in_both_roles_writes_one_answer_three_times(
    tiny: Model, hosted: Callable[[], LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_story, "MAX_TOKENS", 6)
    out, err = io.StringIO(), io.StringIO()
    pair = Pair("tiny", "tiny", True, 1.0, "none")
    with LargeModel(hosted().url, timeout_s=60) as large:
        routing = RoutingRule(EntropyRouter(1.0), ScoreRanks("tiny", "none", 0, {}), has_large=True)
        session = Session(
            SmallModel(*load(tiny.path), name="tiny"),
            large,
            Settings(max_tokens=6, timeout=60),
            routing=routing,
            ledger=Ledger(),
            never_send=(),
        )
        demo_story.tell_story(
            session,
            pair,
            DemoQuestion("Name three fruits."),
            heat=False,
            out=Console(file=out, width=200),
            err=Console(file=err, width=200),
        )
    thirds = out.getvalue().splitlines()
    assert len(thirds) % 3 == 0
    size = len(thirds) // 3
    assert thirds[:size] == thirds[size : 2 * size] == thirds[2 * size :]
    assert "the same" in err.getvalue()


def test_a_server_killed_in_mid_answer_costs_no_token_and_less_than_a_timeout(
    tiny: Model,
    hosted: Callable[[], LocalServer],
    monkeypatch: pytest.MonkeyPatch,
    short_retry_pauses: None,
) -> None:
    # On a slow machine, too, the circuit breaker stays open until the answer ends.
    monkeypatch.setattr(circuit_breaker, "_FIRST_PAUSE_S", 300.0)
    host = hosted()
    with LargeModel(host.url, timeout_s=60) as large:
        answer = generate(
            SmallModel(*load(tiny.path), name="tiny"),
            large,
            "Tell me a long story about a fox.",
            router=EntropyRouter(-math.inf),
            max_tokens=10,
            timeout_s=60,
            mode=Mode.WAIT,
        )
        sources, killed_at = [], math.inf
        for token in answer:
            sources.append(token.source)
            if token.index == 3:
                os.kill(host.pid, signal.SIGKILL)
                killed_at = time.monotonic()
        extra_s = answer.stats().stall_s
    stats = answer.stats()
    assert sources == [Source.LARGE] * 4 + [Source.SMALL] * 6
    assert (stats.tokens, stats.fallbacks, stats.unchecked) == (10, 3, 6)
    assert stats.finish_reason is StopReason.LENGTH
    assert time.monotonic() - killed_at < 60 + 30
    assert extra_s < 120


@pytest.mark.heavy
def test_200_calls_along_smollm2s_answers_leave_the_server_alive(tmp_path: Path) -> None:
    resolved = resolve(
        "smollm2-135m",
        catalog=Catalog.load(),
        cache_dir=cache_folder(),
        offline=False,
        progress=no_progress,
        notify=no_notice,
    )
    # By default the server computes in the stored precision, which is slow without a GPU.
    path = float32_copy(resolved.path, tmp_path / "model")
    questions = ["Why is the sky blue?", "Name three rivers.", "Greet me with many emoji."]
    prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in questions]
    model = load_model(path, prompts, steps=STEPS)
    with (
        stock_server(path, hub_cache=tmp_path / "none") as url,
        LargeModel(url, timeout_s=120) as large,
    ):
        large.connect()
        escalate_along_answers(large, model, calls=200, seed=2)
        assert generates(url)


def float32_copy(path: Path, target: Path) -> Path:
    import mlx.core as mx

    shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in path.glob("*.safetensors"):
        weights: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        dense = {name: value.astype(mx.float32) for name, value in weights.items()}
        mx.save_safetensors(str(target / file.name), dense, {"format": "mlx"})
    return target
