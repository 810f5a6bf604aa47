"""Verdicts: remembered, checked, replaced when they no longer work, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlxroute.large import LargeModel
from mlxroute.large.negotiation.verdict_file import (
    CapabilityCheck,
    ComparedVocabulary,
    RejectedDialect,
    Verdict,
    VerdictFile,
)
from tests.support.connected_clients import save_verdict
from tests.support.family_servers import VOCABULARY, FamilyServer
from tests.support.loopback import Loopback, Reply, Request
from tests.support.vocabularies import context


def test_a_remembered_verdict_is_used_after_one_call(tmp_path: Path) -> None:
    verdicts = tmp_path / "folder" / "verdicts.json"
    with Loopback(FamilyServer("vllm")) as server:
        with LargeModel(server.url, verdicts=verdicts) as large:
            line = large.connect()
        before = len(server.requests)
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert large.connect() == line
        paths = [request.path for request in server.requests[before:]]
    assert paths.count("/v1/completions") == 1
    assert VerdictFile(verdicts).load(server.url, None) is not None


def test_a_verdict_that_no_longer_works_is_replaced(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(FamilyServer("legacy")) as server:
        save_verdict(verdicts, url=server.url, model=None, dialect="mlx_lm completions")
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert "OpenAI completions" in large.connect()
        verdict = VerdictFile(verdicts).load(server.url, None)
    assert verdict is not None
    assert verdict.dialect == "OpenAI completions"


def test_a_remembered_verdict_has_the_context_that_the_server_lists_now(tmp_path: Path) -> None:
    verdicts, family = tmp_path / "verdicts.json", FamilyServer("vllm")
    listed: list[dict[str, object]] = []

    def answer(request: Request) -> Reply:
        if request.path == "/v1/models":
            return Reply.of({"data": listed})
        return family(request)

    with Loopback(answer) as server:
        lists: list[tuple[list[dict[str, object]], int | None]] = [
            ([{"id": "m", "max_model_len": 3}], 3),
            ([{"id": "m", "max_model_len": 4096}], 4096),
            # A list without the model says nothing.
            ([], 4096),
            ([{"id": "m"}], None),
        ]
        for models, expected in lists:
            listed[:] = models
            with LargeModel(server.url, model="m", verdicts=verdicts) as large:
                large.connect()
                verdict = VerdictFile(verdicts).load(server.url, "m")
                assert verdict is not None
                assert verdict.context_length == expected
                if expected != 3:
                    ids = VOCABULARY.encode("1, 2, 3,")
                    large.next_token(context("1, 2, 3,", VOCABULARY, answer=ids))


def test_a_verdict_about_another_model_is_not_used(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(FamilyServer("legacy", models=["new"])) as server:
        save_verdict(verdicts, url=server.url, model=None, dialect="OpenAI completions, text only")
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert "new" in large.connect()
        verdict = VerdictFile(verdicts).load(server.url, None)
    assert verdict is not None
    assert (verdict.model, verdict.dialect) == ("new", "OpenAI completions")


def test_a_server_that_now_gives_token_ids_is_probed_again_at_a_start(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(FamilyServer("legacy")) as server:
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert "(OpenAI completions)" in large.connect()
        server.answer = FamilyServer("vllm")
        with LargeModel(server.url, verdicts=verdicts) as large:
            # There is no time for it in a call.
            assert "(OpenAI completions)" in large.connect(thorough=False)
        for _ in range(2):
            before = len(server.requests)
            with LargeModel(server.url, verdicts=verdicts) as large:
                assert "(vLLM completions)" in large.connect()
        paths = [request.path for request in server.requests[before:]]
        assert paths.count("/v1/completions") == 1
        # The reverse shows in the first check.
        server.answer = FamilyServer("legacy")
        with LargeModel(server.url, verdicts=verdicts) as large:
            assert "(OpenAI completions)" in large.connect()


def test_probing_ignores_what_is_remembered(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.json"
    with Loopback(FamilyServer("legacy")) as server:
        save_verdict(verdicts, url=server.url, model="m", dialect="OpenAI completions, text only")
        with LargeModel(server.url, model="m", verdicts=verdicts) as large:
            assert large.probe().dialect == "OpenAI completions"
            assert "(OpenAI completions)" in large.connect()


def test_verdicts_are_loaded_as_they_were_saved_by_endpoint_and_model(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    with Loopback(FamilyServer("llama-server")) as server, LargeModel(server.url) as large:
        probed = large.probe()
    outdated = ComparedVocabulary("abc", False, "token 7 is 'a' and 'b'")
    same = ComparedVocabulary("def", True)
    differs = ComparedVocabulary("abc", False, "token 8 is 'a' and 'c'")
    for compared in (same, outdated, differs):
        probed = probed.with_vocabulary(compared)
    file = VerdictFile(path)
    file.save(probed, model=None)
    save_verdict(path, url=probed.base_url, model="other", dialect="TGI generate")
    assert file.load(probed.base_url, None) == probed
    assert [probed.compared(name) for name in ("abc", "def", "x")] == [differs, same, None]
    other = file.load(probed.base_url, "other")
    assert other is not None
    assert other.dialect == "TGI generate"
    file.forget(probed.base_url, None)
    file.forget(probed.base_url, "never there")
    assert file.load(probed.base_url, None) is None
    assert file.load(probed.base_url, "other") == other


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
        vocabularies=(
            ComparedVocabulary("1f", True),
            ComparedVocabulary("2e", False, "token 5 is 'a' and 'b'"),
            ComparedVocabulary("3d", False),
        ),
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
            {"name": "vocabulary 2e", "passed": False, "detail": "token 5 is 'a' and 'b'"},
        ],
        "refusals": [{"dialect": "llama-server completion", "reason": "answered 404: Not Found"}],
        "tokens": "the server's tokenise route",
        "context_length": 4096,
        "latency_p50_s": 0.25,
        "latency_p95_s": 0.5,
        "calls": 17,
        "same": [["1f", True], ["2e", False], ["3d", False]],
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
def test_a_damaged_verdict_is_ignored(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "verdicts.json"
    save_verdict(path, url="http://host/v1", model=None, dialect="TGI generate")
    assert VerdictFile(path).load("http://host/v1", None) is not None
    whole = json.loads(path.read_text())
    whole["verdicts"]["http://host/v1 "][name] = value
    path.write_text(json.dumps(whole))
    assert VerdictFile(path).load("http://host/v1", None) is None


def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    save_verdict(path, url="http://host/v1", model=None, dialect="TGI generate")
    sound = json.loads(path.read_text())["verdicts"]
    for text in [*_damaged(sound), "\udcff\udcfe"]:
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert VerdictFile(path).load("http://host/v1", None) is None
    save_verdict(path, url="http://host/v1", model=None, dialect="TGI generate")
    assert VerdictFile(path).load("http://host/v1", None) is not None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "verdicts.json"
    save_verdict(path, url="http://host/v1", model=None, dialect="TGI generate")
    assert VerdictFile(path).load("http://host/v1", None) is None
