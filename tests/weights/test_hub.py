"""Models from the hub: the hub's own client with a hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlxroute import weights
from mlxroute.catalog import Catalog
from mlxroute.errors import CorruptWeights, NotEnoughSpace, WeightsError
from mlxroute.types import no_notice
from mlxroute.weights import hub as hub_module
from tests.support.hub_server import Site, SiteServer

HUB_ID = "some-org/tiny-model"
FILES = {
    "config.json": json.dumps({"model_type": "llama"}).encode(),
    "tokenizer.json": b'{"version": "1.0"}',
    "model-00001-of-00002.safetensors": os.urandom(300_000),
    "model-00002-of-00002.safetensors": os.urandom(200_000),
    "modeling.py": b"raise SystemExit('this code must not run')",
    "README.md": b"# tiny",
}
MODEL_FILES = {name for name in FILES if not name.endswith((".py", ".md"))}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    site = Site(repositories={HUB_ID: dict(FILES)})
    with SiteServer(site) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        yield site


def get(
    cache: Path,
    *,
    function: str = "resolve",
    offline: bool = False,
    reported: list[int] | None = None,
) -> weights.LocalModel:
    def progress(label: str, done: int, total: int | None) -> None:
        assert total is None or 0 <= done <= total
        if reported is not None and label.startswith("downloading"):
            reported.append(done)

    return getattr(weights, function)(  # type: ignore[no-any-return]
        HUB_ID,
        catalog=Catalog((), ()),
        cache_dir=cache,
        offline=offline,
        progress=progress,
        notify=no_notice,
    )


def test_a_repository_is_stored_without_its_code(hub: Site, tmp_path: Path) -> None:
    reported: list[int] = []
    model = get(tmp_path / "cache", reported=reported)
    stored = {path.name: path.read_bytes() for path in model.path.iterdir() if path.is_file()}
    del stored["mlxroute-manifest.json"]
    assert stored == {name: FILES[name] for name in MODEL_FILES}
    assert reported == sorted(reported)
    assert reported[-1] == sum(len(FILES[name]) for name in MODEL_FILES)
    assert model.source == f"hub {HUB_ID} at 01234567"
    assert not list(model.path.glob(".*"))


def test_a_cached_model_needs_no_network(hub: Site, tmp_path: Path) -> None:
    get(tmp_path / "cache")
    hub.requests.clear()
    assert get(tmp_path / "cache", offline=True).path.is_dir()
    assert get(tmp_path / "cache").path.is_dir()
    assert not hub.requests


def test_offline_without_a_cached_model_is_an_error_with_a_remedy(
    hub: Site, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"offline: run `mlxroute pull {HUB_ID}`"):
        get(tmp_path / "cache", offline=True)
    assert not hub.requests


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_an_altered_file_is_refused_and_fetched_again(hub: Site, tmp_path: Path, file: str) -> None:
    hub.altered.add(file)
    with pytest.raises(CorruptWeights, match=rf"{file} of {HUB_ID} .* run the same command"):
        get(tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists()
    hub.altered.clear()
    assert (get(tmp_path / "cache").path / file).read_bytes() == FILES[file]


def test_an_interrupted_transfer_is_resumed(hub: Site, tmp_path: Path) -> None:
    file = "model-00001-of-00002.safetensors"
    hub.repositories[HUB_ID][file] = content = os.urandom(12_000_000)
    hub.cut[file] = 11_000_000
    model = get(tmp_path / "cache")
    assert (model.path / file).read_bytes() == content
    assert len(hub.ranges) == 1
    assert hub.ranges != ["bytes=0-"]


def test_complete_files_of_an_interrupted_pull_are_kept(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One at a time, so that the first file is complete when the third one fails.
    monkeypatch.setattr(hub_module, "PARALLEL_DOWNLOADS", 1)
    first = f"/{HUB_ID}/resolve/0123456789abcdef0123456789abcdef01234567/"
    hub.repositories[HUB_ID]["model-00002-of-00002.safetensors"] = b"other"
    hub.altered.add("model-00002-of-00002.safetensors")
    with pytest.raises(CorruptWeights):
        get(tmp_path / "cache")
    hub.altered.clear()
    hub.requests.clear()
    get(tmp_path / "cache")
    assert hub.requests[f"GET {first}model-00002-of-00002.safetensors"] == 1
    assert hub.requests[f"GET {first}config.json"] == 0


def test_the_error_for_a_missing_repository_names_it(hub: Site, tmp_path: Path) -> None:
    hub.repositories.clear()
    with pytest.raises(WeightsError, match=f"no repository {HUB_ID}"):
        get(tmp_path / "cache")


def test_a_repository_without_mlx_weights_is_refused(hub: Site, tmp_path: Path) -> None:
    hub.repositories[HUB_ID] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(WeightsError, match=r"no config.json with model\*.safetensors"):
        get(tmp_path / "cache")


def test_a_hub_that_does_not_answer_times_out_within_five_seconds(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_module.ANSWER_TIMEOUT_S <= 5.0
    monkeypatch.setattr(hub_module, "ANSWER_TIMEOUT_S", 1.0)
    hub.stalled = True
    with pytest.raises(WeightsError, match=r"hub: (no answer within 1 s|.*timed out)"):
        get(tmp_path / "cache")


def test_disk_space_is_checked_before_the_download(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=400_000))
    with pytest.raises(NotEnoughSpace, match=r"needs 1 MB of disk space in .*, but only 0 MB"):
        get(tmp_path / "cache")
    assert not any("resolve" in request for request in hub.requests)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_pull_replaces_a_damaged_file(hub: Site, tmp_path: Path, damage: str) -> None:
    file = get(tmp_path / "cache").path / "model-00001-of-00002.safetensors"
    stat = file.stat()
    if damage == "altered":
        file.write_bytes(bytes(300_000))
        # The worst case: only the content differs.
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif damage == "truncated":
        os.truncate(file, 1000)
    else:
        file.unlink()
    get(tmp_path / "cache", function="pull")
    assert file.read_bytes() == FILES[file.name]


def test_hf_endpoint_is_honoured(hub: Site, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mlxroute import weights\n"
        "from mlxroute.catalog import Catalog; from mlxroute.types import no_notice, no_progress\n"
        f"print(weights.resolve({HUB_ID!r}, catalog=Catalog((), ()), cache_dir=Path(sys.argv[1]),"
        " offline=False, progress=no_progress, notify=no_notice).source)"
    )
    environment = {**os.environ, "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT}
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cache")],
        env={**environment, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout.strip() == f"hub {HUB_ID} at 01234567", process.stderr
