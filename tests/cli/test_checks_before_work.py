"""Mistakes that are reported before anything is fetched, loaded or measured."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlxroute import weights
from mlxroute.backend import memory
from mlxroute.bench import plot
from mlxroute.bench.plot import check_plot
from mlxroute.cli import main
from mlxroute.cli.bench_report import check_save_option
from mlxroute.cli.folders import model_file_name, record_path
from mlxroute.config import Settings
from mlxroute.errors import UsageError
from mlxroute.hosting import server_choice
from mlxroute.hosting.launcher import LocalServer
from mlxroute.small import SmallModel
from tests.support.gguf_files import TinyModel, write_gguf
from tests.support.loopback import Loopback, Reply
from tests.support.tiny import make_tiny_model


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the model is loaded before the mistake is reported")

    monkeypatch.setattr(SmallModel, "load", fail)


def test_an_adapter_that_cannot_be_read_is_reported_before_the_server_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Loopback(lambda request: Reply()) as server:
        adapter = str(tmp_path / "none")
        assert main(["ask", "--large", server.url, "--adapter", adapter, "hi"]) == 2
        assert server.requests == []
    assert "has no readable adapter_config.json" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
def test_incomplete_prices_are_reported_before_the_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXROUTE_PRICE_INPUT", "2")
    with Loopback(lambda request: Reply()) as server:
        assert main(["ask", "--large", server.url, "hi"]) == 2
        assert server.requests == []
    assert "needs both price_input and price_output" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "/nowhere/h.safetensors"], "there is no file /nowhere/h.safetensors (--head)"),
        (["--router", "head", "--head", "/nowhere/h"], "there is no file /nowhere/h (--head)"),
        (["--router", "head", "--small", "no-such-model"], "there is no head for no-such-model"),
    ],
)
def test_a_missing_head_is_reported_before_the_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--offline", *arguments, "hi"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "head 5%,small"], "--compare head 5%,small: name two sides"),
        (["--compare", "entropy 7%,small"], "--compare entropy 7%,small: name two sides"),
        (["--compare", "large,large"], "--compare large,large: name two sides"),
        (["--oracles"], "has no answer to compare with; --oracles needs one"),
        (["--majority", "5"], "its answer, so there is no majority (--majority)"),
        (["--examples", "FILE"], "too few rows with a `cot`: 0 of the 4 needed"),
        (["--router", "head", "--small", "no-such-model"], "there is no head for no-such-model"),
        (["--head", "/nowhere/h"], "there is no file /nowhere/h (--head)"),
        (["--adapter", "/nowhere"], "the adapter /nowhere has no readable adapter_config.json"),
        (["--budget", "107%"], "is not a share from 0% to 100%"),
        (["--plot", "x.nothing"], "needs a name that ends in one of"),
    ],
)
def test_options_of_bench_quality_that_do_not_fit_are_reported_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "Why?"}\n')
    given = [str(data) if argument == "FILE" else argument for argument in arguments]
    # Nothing listens there, which would be another error.
    quality = ["bench", "quality", "--large", "http://127.0.0.1:9/v1", "--data", str(data)]
    assert main([*quality, "--router", "entropy", "--budget", "5%", *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("nothing_loads")
def test_bench_quality_measures_a_head_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = tmp_path / "h.safetensors"
    head.touch()
    quality = ["bench", "quality", "--large", "http://127.0.0.1:9/v1", "--budget", "5%"]
    assert main([*quality, "--compare", "none,small", "--head", str(head)]) == 2
    sides = "small, large, entropy 5%, random 5%, position 5%, first 5%, sentence 5%, head 5%"
    assert sides in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("command", ["train", "adapt", "bench quality", "bench latency"])
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MLXROUTE_OFFLINE", "true", "asks a large model, but the settings say `offline`"),
        ("MLXROUTE_NEVER_SEND", "(?i)zebra", "matches never-send pattern 1"),
    ],
)
def test_nothing_is_sent_that_the_settings_keep_here(
    command: str,
    variable: str,
    value: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "prompts.jsonl"
    # Files may number their rows alike.
    prompts = [*(f"Why {number}?" for number in range(10)), "When does Zebra ship?"]
    data.write_text("".join(f'{{"id": 0, "prompt": "{prompt}"}}\n' for prompt in prompts))
    out = ["--out", str(tmp_path / "out")] if command == "adapt" else []
    monkeypatch.setenv(variable, value)
    with Loopback(lambda request: Reply()) as server:
        arguments = ["--data", str(data), "--large", server.url, *out]
        assert main([*command.split(), *arguments]) == 2
        assert server.requests == []
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("nothing_loads")
def test_bench_latency_shows_worked_examples_before_the_built_in_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = tmp_path / "examples.jsonl"
    row = {"id": 0, "prompt": "When does Zebra ship?", "answer": "in May", "cot": "So in May."}
    examples.write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("MLXROUTE_NEVER_SEND", "Zebra")
    command = ["bench", "latency", "--large", "http://127.0.0.1:9/v1", "--shots", "1"]
    assert main([*command, "--examples", str(examples)]) == 2
    assert "matches never-send pattern 1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("train", "x.safetensors", "x.safetensors exists and is not a head"),
        ("adapt", "", "choose a new folder for the adapter"),
    ],
)
def test_a_home_folder_in_out_is_replaced(
    command: str,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "q.jsonl"
    data.write_text("".join(f'{{"prompt": "Why {number}?"}}\n' for number in range(10)))
    (tmp_path / "x.safetensors").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [command, "--data", str(data), "--large", "http://127.0.0.1:9/v1"]
    assert main([*arguments, f"--out=~/{name}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert f"--out {tmp_path}" in error


@pytest.mark.usefixtures("nothing_loads")
def test_the_rank_of_an_adapter_cannot_be_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["adapt", "--data", "x", "--out", "y", "--large", "http://127.0.0.1:9/v1"]
    assert main([*arguments, "--adapter", str(tmp_path), "--rank", "8"]) == 2
    assert "--rank cannot be given with an adapter to start from" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("kind", ["dora", "full"])
def test_an_adapter_that_cannot_be_trained_further_is_reported_before_its_answers_are_asked_for(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"fine_tune_type": kind}))
    (adapter / "adapters.safetensors").touch()
    data = tmp_path / "q.jsonl"
    data.write_text("".join(f'{{"prompt": "Why {number}?"}}\n' for number in range(10)))
    with Loopback(lambda request: Reply()) as server:
        arguments = ["adapt", "--data", str(data), "--out", str(tmp_path / "out")]
        arguments += ["--large", server.url, "--adapter"]
        assert main([*arguments, str(adapter)]) == 2
        assert "has no LoRA weights to train further" in " ".join(capsys.readouterr().err.split())
        assert main([*arguments, "/nowhere"]) == 2
        assert "the adapter /nowhere has no readable" in " ".join(capsys.readouterr().err.split())
        assert server.requests == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.nothing", "needs a name that ends in one of"),
        ("x", "needs a name that ends in one of"),
        ("nowhere/x.svg", "needs an existing folder"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_reported_before_the_measurement(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        check_plot(tmp_path / name)
    check_plot(tmp_path / "x.svg")
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_saved_is_reported_before_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_save_option(True)
    (tmp_path / "bench" / "results").rmdir()
    (tmp_path / "bench" / "results").write_text("x")
    with pytest.raises(UsageError, match=r"bench/results cannot be made"):
        check_save_option(True)


@pytest.mark.parametrize(
    ("model", "name"),
    [("qwen3-8b", "qwen3-8b"), ("/models/my model", "my-model"), ("org/name", "name")],
)
def test_the_name_of_a_report_has_no_folders(model: str, name: str) -> None:
    assert model_file_name(model) == name


def test_records_of_models_with_names_that_shorten_equally_are_apart(tmp_path: Path) -> None:
    settings = Settings(cache_dir=str(tmp_path))
    names = ["a" * 60, "a" * 61, "/runs/1/step-500", "/runs/2/step-500", "step-500", "org/step-500"]
    paths = {record_path(settings, "replies", "small", name) for name in names}
    assert len(paths) == len(names)
    assert (
        record_path(settings, "replies", "s", "qwen2.5-32b").name == "replies-s-qwen2.5-32b.jsonl"
    )


@pytest.mark.parametrize("flag", [[], ["--skip-memory-check"]])
def test_a_model_that_needs_too_much_memory_is_refused_unless_the_check_is_skipped(
    flag: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    file = write_gguf(tmp_path / "tiny.gguf", TinyModel())
    cache = tmp_path / "cache"
    code = main(
        [
            *("ask", "--offline", "--cache-dir", str(cache), "--small", str(file)),
            *("--max-tokens", "2", *flag, "hi"),
        ]
    )
    errors = capsys.readouterr().err
    if flag:
        assert code == 0, errors
        assert len(list((cache / "models").iterdir())) == 1
    else:
        assert code == 2
        assert "the small model tiny.gguf needs 0.6 GiB of memory and 0.0 GiB are free" in errors
        assert "skip this check (--skip-memory-check)" in errors
        assert not (cache / "models").exists()


@pytest.fixture
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("a model is fetched before the mistake is reported")

    monkeypatch.setattr(weights, "resolve", fail)


@pytest.mark.usefixtures("nothing_is_fetched")
def test_a_port_in_use_is_reported_before_a_model_is_fetched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["host", "qwen2.5-32b", "--skip-memory-check", "--port", str(port)]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_is_fetched")
@pytest.mark.parametrize("words", [["host", "smollm2-135m"], ["demo"]])
def test_a_missing_llama_cpp_is_reported_before_a_model_is_fetched(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_choice, "find_spec", lambda name: None)
    assert main([*words, "--engine", "llama.cpp", "--skip-memory-check"]) == 2
    assert "llama.cpp is not installed" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_is_fetched")
@pytest.mark.parametrize(
    ("variable", "value"), [("LEDGER", "/nowhere/ledger"), ("NEVER_SEND_FILE", "/nowhere/file")]
)
def test_demo_reports_settings_it_cannot_use_before_a_model_is_fetched(
    variable: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"MLXROUTE_{variable}", value)
    assert main(["demo", "--skip-memory-check"]) == 2
    assert value in capsys.readouterr().err


def test_host_waits_for_a_load_from_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_s: list[float] = []

    def wait(server: LocalServer, *, timeout_s: float, progress: object) -> None:
        limits_s.append(timeout_s)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalServer, "wait_until_ready", wait)
    folder = make_tiny_model(tmp_path / "tiny")
    assert main(["host", str(folder), "--skip-memory-check"]) == 130
    assert limits_s == [86_400]


@pytest.mark.parametrize("content", [b"weights", None])
def test_train_replaces_no_file_that_is_not_a_head(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "model.safetensors"
    data.write_text('{"prompt": "Why?"}\n')
    if content is None:
        mx.save_safetensors(str(out), {"layers.0.weight": mx.zeros((2, 2))})
    else:
        out.write_bytes(content)
    before = out.read_bytes()
    arguments = ["train", "--data", str(data), "--large", "http://127.0.0.1:9/v1"]
    assert main([*arguments, "--out", str(out)]) == 2
    assert f"--out {out} exists and is not a head; choose another name" in " ".join(
        capsys.readouterr().err.split()
    )
    assert out.read_bytes() == before


_LONG = "x" * 256


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ask", "--save", _LONG, "hi"], "File name too long"),
        (["ask", "--save", "nowhere/a.json", "hi"], "nowhere is not a folder to write to"),
        (["ask", "--save", "q.jsonl/a.json", "hi"], "q.jsonl is not a folder to write to"),
        (["ask", "--save", "folder", "hi"], "it is not a regular file"),
        (["train", "--out", f"new/{_LONG}.safetensors"], "File name too long (--out)"),
        (["adapt", "--out", f"new/{_LONG}"], "File name too long (--out)"),
        (["adapt", "--out", "q.jsonl/new"], "q.jsonl is not a folder to write to (--out)"),
        (["bench", "latency", "--plot", f"{_LONG}.svg"], "File name too long (--plot)"),
        (["bench", "quality", "--plot", f"{_LONG}.svg"], "File name too long (--plot)"),
    ],
)
def test_a_file_that_cannot_be_written_is_reported_before_the_server_is_asked(
    words: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    Path("folder").mkdir()
    Path("q.jsonl").write_text(
        "".join(f'{{"prompt": "Question {number}?"}}\n' for number in range(10))
    )
    data = ["--data", "q.jsonl"] if words[0] != "ask" else []
    with Loopback(lambda request: Reply()) as server:
        assert main([*words, *data, "--large", server.url]) == 2
        assert server.requests == []
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: cannot save to ")
    assert error.endswith(reason)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "q.jsonl"]


@pytest.mark.usefixtures("nothing_loads")
def test_ranks_that_cannot_be_written_are_reported_before_they_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXROUTE_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").touch()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "ranks").write_text("a file, not a folder")
    data = tmp_path / "q.jsonl"
    data.write_text('{"prompt": "Why?"}\n')
    assert main(["calibrate", "--data", str(data)]) == 2
    assert "ranks is not a folder to write to" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("words", [("train",), ("adapt", "--out", "adapter")])
def test_too_few_questions_are_reported_before_the_server_is_asked(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"prompt": "Question {number}?"}}\n' for number in range(9)]
    Path("few.jsonl").write_text("".join([*rows, rows[0]]))
    with Loopback(lambda request: Reply()) as server:
        assert main([*words, "--data", "few.jsonl", "--large", server.url]) == 2
        assert server.requests == []
    error = " ".join(capsys.readouterr().err.split())
    assert "at least 10 different questions are needed, and few.jsonl gave 9" in error
    assert error.endswith("take more questions of each (--questions)")


def test_a_head_is_checked_after_the_fast_blas_is_loaded(tmp_path: Path) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "head.safetensors"
    data.write_text('{"prompt": "Why?"}\n')
    script = (
        "import sys; from pathlib import Path; from mlxroute.backend import blas\n"
        "from mlxroute.cli import main\n"
        f"main(['train', '--data', {str(data)!r}, '--out', {str(out)!r},"
        " '--large', 'http://127.0.0.1:9/v1'])\n"
        f"sys.exit('MLX was imported first' in blas.interpose(Path({str(tmp_path)!r})))"
    )
    result = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True)
    assert result.returncode == 0


def test_a_plot_is_checked_without_loading_matplotlib(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mlxroute.bench.plot import check_plot\n"
        "check_plot(Path('x.svg'))\n"
        "sys.exit('matplotlib' in sys.modules)"
    )
    pytest.importorskip("matplotlib")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=120)
    assert result.returncode == 0


def test_every_kind_of_plot_that_is_accepted_can_be_drawn() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert set(plot._KINDS) <= set(figure.canvas.get_supported_filetypes())
