"""The public JSON: every key is listed here, so that no rename in the library changes it."""

from __future__ import annotations

import io
import json
import resource
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.cli import main
from mlxroute.cli.bench_report import write_report
from mlxroute.cli.commands.calibrate import report_object as calibrate_report
from mlxroute.cli.json_lines import event_object, write_json, write_object
from mlxroute.cli.process_signals import Terminated
from mlxroute.errors import LargeTimeout, LargeUnsendable
from mlxroute.types import Provisional, Retracted, Signals, Source
from tests.support.connected_clients import legacy
from tests.support.documents import record_answer
from tests.support.loopback import Loopback, Reply
from tests.support.negotiated import honest
from tests.support.scripted_answer import ScriptedAnswer
from tests.support.scripted_models import ScriptedLarge, ScriptedSmall
from tests.support.tiny import make_tiny_model

SESSION: Any = SimpleNamespace(
    routing=SimpleNamespace(name="entropy", threshold=1.0, budget=None),
    small=SimpleNamespace(name="tiny"),
    large=None,
)
TOKEN_KEYS = [
    "type",
    "index",
    "id",
    "text",
    "source",
    "score",
    "threshold",
    "judgement",
    "entropy_nats",
    "margin",
    "small_id",
    "escalated",
    "checked",
    "large",
    "prefetched",
    "accepted",
    "failure",
    "time_s",
]
LARGE_KEYS = ["id", "ids", "text", "logprob", "top", "latency_s"]
SUMMARY_KEYS = [
    "type",
    "text",
    "tokens",
    "large_tokens",
    "escalated",
    "agreed",
    "accepted",
    "fallbacks",
    "unchecked",
    "withheld",
    "finish_reason",
    "prompt_tokens",
    "cached_prompt_tokens",
    "ttft_s",
    "itl_p50_s",
    "itl_p95_s",
    "stall_s",
    "tokens_per_s",
    "total_s",
    "requests",
    "uploaded_tokens",
    "uploaded_bytes",
    "large_cached_tokens",
    "large_completion_tokens",
    "cost_estimate",
    "mode",
    "calls",
    "retracted",
    "prefetch_generated",
    "prefetch_used",
    "held",
    "redecoded",
    "plan",
    "advice",
    "escalation_rate",
    "agreement",
    "failures",
    "router",
    "threshold",
    "budget",
    "small",
    "large",
]


def ask_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["ask", "--json", *arguments, "hello"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_tokens_and_summary_have_these_keys_in_this_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(make_tiny_model(tmp_path / "tiny", context=200))
    with Loopback(honest(lambda request: Reply.of(legacy("a")), name="huge")) as server:
        routed = ["--small", tiny, "--large", server.url, "--threshold", "-inf"]
        token, *_, summary = ask_json(capsys, *routed, "--mode", "wait", "--max-tokens", "2")
    assert list(token) == TOKEN_KEYS
    assert list(token["large"]) == LARGE_KEYS
    assert list(summary) == SUMMARY_KEYS
    assert (token["type"], summary["type"]) == ("token", "summary")
    token, *_, summary = ask_json(capsys, "--small", tiny, "--offline", "--max-tokens", "2")
    assert (list(token), token["large"]) == (TOKEN_KEYS, None)
    assert (list(summary), summary["large"]) == (SUMMARY_KEYS, None)


def test_the_summary_has_a_budget_of_7_percent_unless_a_threshold_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(make_tiny_model(tmp_path / "tiny", context=200))
    with Loopback(honest(lambda request: Reply.of(legacy("a")), name="huge")) as server:
        always = ["--small", tiny, "--large", server.url, "--max-tokens", "2"]
        by_default = ask_json(capsys, *always)[-1]
        threshold = ask_json(capsys, *always, "--threshold", "inf")[-1]
    assert by_default["budget"] == 0.07
    assert by_default["threshold"] not in ("inf", "-inf")
    assert (threshold["budget"], threshold["threshold"]) == (None, "inf")


def test_provisional_and_retracted_tokens_have_these_keys() -> None:
    signals = Signals(7, -0.5, 1.0, 0.5, 0.2, (7,), (-0.5,))
    assert event_object(Provisional(3, 7, " the", Source.SMALL, signals)) == {
        "type": "provisional",
        "index": 3,
        "id": 7,
        "text": " the",
        "source": "small",
    }
    assert event_object(Retracted(3)) == {"type": "retracted", "index": 3}


def test_a_token_whose_call_was_not_made_has_the_reason_as_its_failure() -> None:
    small = ScriptedSmall(b"ab", entropies={0: 2.0})
    answer = record_answer(small, ScriptedLarge([LargeUnsendable("too long")]))
    unchecked, checked, *_ = map(event_object, answer)
    assert (unchecked["checked"], unchecked["failure"]) == (False, "too long")
    assert (checked["checked"], checked["failure"]) == (True, None)


@pytest.mark.parametrize(
    ("reason", "lines"),
    # A reader that stalls would keep a summary after SIGTERM waiting, and the answer unsaved.
    [(LargeTimeout("no reply"), ["token", "summary"]), (Terminated(143), ["token"])],
)
def test_an_answer_that_a_failure_ends_has_a_summary_but_not_one_that_sigterm_ends(
    reason: BaseException, lines: list[str]
) -> None:
    stream = io.StringIO()
    with pytest.raises(type(reason)):
        write_json(ScriptedAnswer(["a", reason]), SESSION, stream=stream)  # type: ignore[arg-type]
    objects = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [item["type"] for item in objects] == lines
    assert {item["text"] for item in objects} == {"a"}


def test_a_strict_answer_that_fails_ends_with_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(make_tiny_model(tmp_path / "tiny", context=200))
    replies = iter([Reply.of(legacy("a"))])
    with Loopback(honest(lambda request: next(replies, Reply(status=501)))) as server:
        routed = ["--small", tiny, "--large", server.url, "--threshold", "-inf", "--strict"]
        assert main(["ask", "--json", *routed, "--mode", "wait", "--prefetch", "0", "hi"]) == 3
    token, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (token["text"], summary["type"], summary["tokens"]) == ("a", "summary", 1)


def test_infinities_and_nan_become_strings_at_any_depth() -> None:
    stream = io.StringIO()
    write_object({"a": float("nan"), "top": [[" the", float("-inf")], ["x", -1.0]]}, stream)
    assert json.loads(stream.getvalue(), parse_constant=pytest.fail) == {
        "a": "nan",
        "top": [[" the", "-inf"], ["x", -1.0]],
    }


def test_the_report_of_calibrate_has_these_keys_in_this_order() -> None:
    quantiles = {"entropy": (0.0, 1.0), "random": (0.0, 1.0)}
    report = calibrate_report(ScoreRanks("tiny", "3 questions of mine", 300, quantiles))
    assert list(report) == ["small", "data", "positions", "thresholds"]
    assert list(report["thresholds"]) == ["entropy"]
    rates = ["0.01", "0.03", "0.05", "0.07", "0.1", "0.15", "0.3"]
    assert list(report["thresholds"]["entropy"]) == rates


def test_a_bench_report_begins_with_its_command_and_environment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert write_report({"kernels": []}, "kernels", save=False) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["command", "date", "machine", "versions", "kernels"]


def test_a_bench_report_that_cannot_be_saved_is_printed_and_the_old_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bench" / "results" / "kernels.json"
    file.parent.mkdir(parents=True)
    assert write_report({"kernels": []}, "kernels", save=True) == 0
    before = file.read_bytes()
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*kernels\.json'$"):
            write_report({"kernels": "x" * 9000}, "kernels", save=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert json.loads(capsys.readouterr().out)["kernels"] == "x" * 9000


@pytest.mark.parametrize("flag", [["--large"], []])
def test_the_command_of_a_bench_report_can_be_repeated_and_has_no_password(
    flag: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://me:hunter2@box:8000/v1"
    large = [*flag, address] if flag else [f"--large={address}"]
    words = ["bench", "quality", "--compare", "entropy 10%,small", *large]
    monkeypatch.setattr("sys.argv", ["mlxroute", *words])
    assert write_report({}, "quality", save=False) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    shown = [word.replace("me:hunter2@", "") for word in words]
    assert shlex.split(command) == ["mlxroute", *shown]
