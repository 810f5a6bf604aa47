"""What a probe found is remembered, checked, dropped when it no longer fits, mended if damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlxroute.large import LargeModel
from mlxroute.large.negotiation.verdict_file import (
    CapabilityCheck,
    RejectedDialect,
    Verdict,
    VerdictFile,
)
from tests.support.asking import remember
from tests.support.loopback import Loopback
from tests.support.truthful import Truthful


def test_a_remembered_verdict_is_used_after_one_call(tmp_path: Path) -> None:
    verdicts = tmp_path / "folder" / "verdicts.json"
    with Loopback(Truthful("vllm")) as server:
        with LargeModel(server.url, verdicts=verdicts) as large:
            line = large.connect()
        asked = len(server.requests)
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert large.connect() == line
        paths = [request.path for request in server.requests[asked:]]
    assert paths.count("/v1/completions") == 1
    assert VerdictFile(verdicts).load(server.url, None) is not None


def test_a_verdict_that_no_longer_fits_is_found_anew(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(Truthful("legacy")) as server:
        remember(verdicts, url=server.url, model=None, dialect="mlx_lm completions")
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert "OpenAI completions" in large.connect()
        verdict = VerdictFile(verdicts).load(server.url, None)
    assert verdict is not None
    assert verdict.dialect == "OpenAI completions"


def test_a_verdict_about_another_model_is_not_used(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(Truthful("legacy", models=["new"])) as server:
        remember(verdicts, url=server.url, model=None, dialect="OpenAI completions, text only")
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert "new" in large.connect()
        verdict = VerdictFile(verdicts).load(server.url, None)
    assert verdict is not None
    assert (verdict.model, verdict.dialect) == ("new", "OpenAI completions")


def test_probing_ignores_what_is_remembered(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(Truthful("legacy")) as server:
        remember(verdicts, url=server.url, model="m", dialect="OpenAI completions, text only")
        with LargeModel(server.url, model="m", verdicts=verdicts) as large:
            assert large.probe().dialect == "OpenAI completions"
            assert "(OpenAI completions)" in large.connect()


def test_verdicts_come_back_as_they_were_saved_each_under_its_own_model(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    with Loopback(Truthful("llama-server")) as server, LargeModel(server.url) as large:
        found = (
            large.probe().with_vocabulary("abc", shared=True).with_vocabulary("def", shared=False)
        )
    file = VerdictFile(path)
    file.save(found, model=None)
    remember(path, url=found.base_url, model="other", dialect="TGI generate")
    assert file.load(found.base_url, None) == found
    assert (found.is_shared("abc"), found.is_shared("def"), found.is_shared("x")) == (
        True,
        False,
        None,
    )
    other = file.load(found.base_url, "other")
    assert other is not None
    assert other.dialect == "TGI generate"
    file.forget(found.base_url, None)
    file.forget(found.base_url, "never there")
    assert file.load(found.base_url, None) is None
    assert file.load(found.base_url, "other") == other


def test_the_file_has_these_keys_and_values(tmp_path: Path) -> None:
    """Released versions read and write this text; a change of it needs another format number."""
    path = tmp_path / "endpoints.json"
    verdict = Verdict(
        base_url="http://host/v1",
        model="m",
        dialect="vLLM completions",
        rung=1,
        checks=(
            CapabilityCheck("mid-word", True, "'pine' + 'apple'"),
            CapabilityCheck("prefix cache", None, "the server does not report it"),
        ),
        rejected=(RejectedDialect("llama-server completion", "answered 404: Not Found"),),
        token_source="the server's tokenise route",
        context_length=4096,
        latency_p50_s=0.25,
        latency_p95_s=0.5,
        requests=17,
        shared_vocabularies=(("1f", True), ("2e", False)),
    )
    bare = replace(verdict, model=None, token_source=None, context_length=None)
    VerdictFile(path).save(verdict, model=None)
    VerdictFile(path).save(bare, model="other")
    entry = {
        "base_url": "http://host/v1",
        "model": "m",
        "dialect": "vLLM completions",
        "rung": 1,
        "checks": [
            {"name": "mid-word", "passed": True, "detail": "'pine' + 'apple'"},
            {"name": "prefix cache", "passed": None, "detail": "the server does not report it"},
        ],
        "refusals": [{"dialect": "llama-server completion", "reason": "answered 404: Not Found"}],
        "tokens": "the server's tokenise route",
        "context_length": 4096,
        "latency_p50_s": 0.25,
        "latency_p95_s": 0.5,
        "calls": 17,
        "same": [["1f", True], ["2e", False]],
    }
    bare_entry = entry | {"model": None, "tokens": None, "context_length": None}
    entries = {"http://host/v1 ": entry, "http://host/v1 other": bare_entry}
    assert path.read_text() == json.dumps({"format": 1, "verdicts": entries}, indent=1)
    assert VerdictFile(path).load("http://host/v1", None) == verdict
    assert VerdictFile(path).load("http://host/v1", "other") == bare


def _damaged(value: object) -> list[str]:
    return [
        "",
        "{",
        "[" * 100_000,
        "null",
        "[]",
        json.dumps({"verdicts": value}),
        json.dumps({"format": 0, "verdicts": value}),
        json.dumps({"format": 2, "verdicts": value}),
        json.dumps({"format": 1, "verdicts": [value]}),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dialect", 5),
        ("dialect", None),
        ("base_url", None),
        ("model", 7),
        ("rung", "1"),
        ("rung", True),
        ("calls", None),
        ("context_length", "long"),
        ("latency_p50_s", "fast"),
        ("latency_p95_s", None),
        ("tokens", ["x"]),
        ("checks", [5]),
        ("checks", [{"name": "mid-word"}]),
        ("checks", [{"name": "mid-word", "passed": "yes", "detail": ""}]),
        ("refusals", {"dialect": "x"}),
        ("refusals", [{"dialect": "x", "reason": 3}]),
        ("same", [["fingerprint", "no"]]),
        ("same", [[1, True]]),
        ("same", None),
        ("unheard_of", 1),
    ],
)
def test_a_damaged_verdict_is_probed_again(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "verdicts.json"
    remember(path, url="http://host/v1", model=None, dialect="TGI generate")
    assert VerdictFile(path).load("http://host/v1", None) is not None
    whole = json.loads(path.read_text())
    whole["verdicts"]["http://host/v1 "][name] = value
    path.write_text(json.dumps(whole))
    assert VerdictFile(path).load("http://host/v1", None) is None


def test_a_damaged_file_is_probed_again_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    remember(path, url="http://host/v1", model=None, dialect="TGI generate")
    sound = json.loads(path.read_text())["verdicts"]
    for text in [*_damaged(sound), "\udcff\udcfe"]:
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert VerdictFile(path).load("http://host/v1", None) is None
    remember(path, url="http://host/v1", model=None, dialect="TGI generate")
    assert VerdictFile(path).load("http://host/v1", None) is not None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "verdicts.json"
    remember(path, url="http://host/v1", model=None, dialect="TGI generate")
    assert VerdictFile(path).load("http://host/v1", None) is None
