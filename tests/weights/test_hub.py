"""Models from the hub: the hub's own client with a hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from mlxroute import weights
from mlxroute.catalog import Catalog
from mlxroute.errors import CorruptWeights, NotEnoughSpace, SourceUnreachable, WeightsError
from mlxroute.types import Notify, no_notice
from mlxroute.weights import byte_counter, hub_listing
from mlxroute.weights import hub as hub_module
from mlxroute.weights.request import ANSWER_TIMEOUT_S, STALL_TIMEOUT_S
from tests.support.hub_server import REVISION, Site, SiteServer, git_blob_id

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
    notify: Notify = no_notice,
    **options: Any,
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
        notify=notify,
        **options,
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
    fetched = get(tmp_path / "cache")
    hub.requests.clear()
    assert get(tmp_path / "cache", offline=True) == fetched
    assert get(tmp_path / "cache") == fetched
    assert len(fetched.fingerprint) == 16
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


def test_files_that_a_later_revision_lacks_are_not_kept(hub: Site, tmp_path: Path) -> None:
    hub.altered.add("model-00002-of-00002.safetensors")
    with pytest.raises(CorruptWeights):
        get(tmp_path / "cache")
    hub.altered.clear()
    sharded = {name for name in FILES if name.startswith("model-")}
    later = {name: FILES[name] for name in FILES if name not in sharded}
    hub.repositories[HUB_ID] = {**later, "model.safetensors": os.urandom(1000)}
    model = get(tmp_path / "cache")
    assert {file.name for file in model.path.glob("model*")} == {"model.safetensors"}


def test_a_repository_with_a_manifest_of_its_own_is_used(hub: Site, tmp_path: Path) -> None:
    hub.repositories[HUB_ID]["mlxroute-manifest.json"] = b"{}"
    get(tmp_path / "cache")
    assert get(tmp_path / "cache", function="pull", offline=True).path.is_dir()


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
    assert ANSWER_TIMEOUT_S <= 5.0
    monkeypatch.setattr(hub_listing, "ANSWER_TIMEOUT_S", 1.0)
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


@pytest.fixture
def stale_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_stale")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.usefixtures("stale_token")
def test_a_public_model_is_fetched_without_a_token_that_the_hub_refuses(
    hub: Site, tmp_path: Path, status: int
) -> None:
    hub.refused_token = status
    lines: list[str] = []
    model = get(tmp_path / "cache", notify=lambda line: lines.append(line))
    assert (model.path / "config.json").read_bytes() == FILES["config.json"]
    assert lines == [
        f"hub: it refuses the token of HF_TOKEN; fetching {HUB_ID}, which is public, without it"
    ]


@pytest.mark.usefixtures("stale_token")
def test_a_refused_token_is_named_where_no_public_model_is(hub: Site, tmp_path: Path) -> None:
    hub.refused_token = 401
    hub.repositories.clear()
    message = rf"refuses the token of HF_TOKEN, and lists no public repository {HUB_ID}; renew"
    with pytest.raises(WeightsError, match=message):
        get(tmp_path / "cache")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", r"no repository .* \(a private one needs HF_TOKEN"),
        (404, "RepoNotFound", r"no repository .* \(a private one needs HF_TOKEN"),
        (401, "GatedRepo", "accept its licence on its page and to set HF_TOKEN"),
        (403, "GatedRepo", "accept its licence on its page and to set HF_TOKEN"),
        (500, "", "it answers 500"),
        (429, "", "it answers 429"),
    ],
)
def test_each_refusal_of_the_hub_has_its_own_message(
    hub: Site, tmp_path: Path, status: int, code: str, message: str
) -> None:
    hub.refusal = (status, code)
    with pytest.raises(WeightsError, match=message) as caught:
        get(tmp_path / "cache")
    assert f"HF_ENDPOINT is {huggingface_hub.constants.ENDPOINT}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_in_hf_endpoint_is_in_no_message(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = huggingface_hub.constants.ENDPOINT
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", address.replace("//", "//me:s3cret%21@")
    )
    hub.refusal = (500, "")
    with pytest.raises(WeightsError, match="it answers 500") as caught:
        get(tmp_path / "cache")
    assert f"; HF_ENDPOINT is {address}" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("before", ["", "x" * 250])
def test_the_text_of_a_failure_has_no_password(before: str) -> None:
    error = OSError(f"{before} for url 'http://me:s3cret@{'h' * 300}/api' and\nmore")
    text = hub_listing.failure_text(error)
    assert "s3cret" not in text
    assert "\n" not in text


def test_a_token_with_other_characters_is_named(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u00e9")
    with pytest.raises(WeightsError, match="token of HF_TOKEN has characters that no token has"):
        get(tmp_path / "cache")


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>login</html>",
        b"[]",
        b"null",
        b'{"id": "o/m", "siblings": "x"}',
        b'{"id": "o/m", "siblings": [{"rfilename": "config.json", "size": "x"}]}',
        b'{"id": "o/m", "siblings": [{"rfilename": "config.json", "size": -5}]}',
    ],
)
def test_an_answer_that_is_no_listing_is_named(hub: Site, tmp_path: Path, listing: bytes) -> None:
    hub.listing = listing
    with pytest.raises(WeightsError, match="its answer is not a listing of files"):
        get(tmp_path / "cache")


@pytest.mark.parametrize(
    "hashes", [{}, {"blobId": "of a pointer", "lfs": {"size": 1, "sha256": None, "pointerSize": 1}}]
)
def test_a_hub_that_lists_no_hash_of_a_file_is_not_used(
    hashes: dict[str, object], hub: Site, tmp_path: Path
) -> None:
    siblings = [
        {"rfilename": name, "size": len(content)}
        | (hashes if name == "config.json" else {"blobId": git_blob_id(content)})
        for name, content in FILES.items()
    ]
    hub.listing = json.dumps({"id": HUB_ID, "sha": REVISION, "siblings": siblings}).encode()
    message = f"hub: it lists no hash to verify config.json of {HUB_ID} with; HF_ENDPOINT is"
    with pytest.raises(SourceUnreachable, match=message):
        get(tmp_path / "cache")
    assert not any("resolve" in request for request in hub.requests)


def test_a_file_with_a_hash_of_git_is_read_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_counter, "CHUNK_BYTES", 4)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(b"0123456789")
    sizes: list[int] = []
    listed = hub_module._ListedFile(10, None, git_blob_id(file.read_bytes()))
    hub_module._verify(file, listed, HUB_ID, sizes.append)
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "", r"refuses its files \(status 401\); check HF_TOKEN"),
        (403, "", r"refuses its files \(status 403\); check HF_TOKEN"),
        (401, "GatedRepo", "accept its licence on its page"),
        (403, "GatedRepo", "accept its licence on its page"),
    ],
)
def test_files_that_the_hub_refuses_are_no_interrupted_download(
    hub: Site, tmp_path: Path, status: int, code: str, message: str
) -> None:
    hub.refused_files = (status, code)
    with pytest.raises(WeightsError, match=message) as caught:
        get(tmp_path / "cache")
    assert "interrupted" not in str(caught.value)


def test_an_id_that_is_too_long_for_the_hub_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no such directory"):
        weights.resolve(
            "o/" + "a" * 300,
            catalog=Catalog((), ()),
            cache_dir=tmp_path,
            offline=False,
            progress=lambda *_: None,
            notify=no_notice,
        )


def test_an_offline_variable_is_named(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids"):
        get(tmp_path / "cache")


def test_a_folder_of_the_hub_that_cannot_be_used_is_named(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "file" / "t"))
    with pytest.raises(WeightsError, match=r"token cannot be read \(.*/file/t: Not a directory\)"):
        get(tmp_path / "cache")


def test_a_stalled_transfer_ends_with_a_hint(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "STALL_TIMEOUT_S", 1.0)
    name = "model-00001-of-00002.safetensors"
    hub.held.add(f"/{HUB_ID}/resolve/{REVISION}/{name}")
    began_s = time.monotonic()
    with pytest.raises(WeightsError, match=r"stalled: no data for 1 s; .* HF_HUB_DISABLE_XET=1"):
        get(tmp_path / "cache")
    assert time.monotonic() - began_s < 8
    hub.held.clear()
    assert (get(tmp_path / "cache").path / name).read_bytes() == FILES[name]


def test_bytes_of_a_slow_line_are_not_reported_too_late_for_a_stall(
    hub: Site, tmp_path: Path
) -> None:
    hub.repositories[HUB_ID]["model-00001-of-00002.safetensors"] = os.urandom(2_000_000)
    reported: list[int] = []
    get(tmp_path / "cache", reported=reported)
    # Three files share the line: at 15 KB/s each reports within a minute.
    slowest = 3 * max(later - done for done, later in pairwise(reported))
    assert slowest / STALL_TIMEOUT_S < 15_000


def test_a_failed_fetch_ends_the_other_downloads(hub: Site, tmp_path: Path) -> None:
    slow, altered = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    hub.repositories[HUB_ID][slow] = os.urandom(4_000_000)
    hub.paused[slow] = 1_000_000
    hub.altered.add(altered)
    reported: list[int] = []
    with pytest.raises(CorruptWeights, match=altered):
        get(tmp_path / "cache", reported=reported)
    reported.clear()
    hub.release.set()
    for thread in threading.enumerate():
        if thread.name == "mlxroute-task":
            thread.join(30)
    assert reported == []
    assert not list((tmp_path / "cache").rglob(slow))


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"torch_dtype": "bfloat16"}, 2.0),
        ({"dtype": "float32"}, 1.0),
        ({"quantization": {"bits": 4, "group_size": 64}}, 32 / 4.5),
        ({"quantization": "4bit"}, 1.0),
        ({"text_config": {"torch_dtype": "bfloat16"}}, 2.0),
        ({"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"}, 4.0),
    ],
)
def test_the_size_is_checked_before_the_weights_are_downloaded(
    hub: Site, tmp_path: Path, config: dict[str, object], factor: float
) -> None:
    hub.repositories[HUB_ID]["config.json"] = json.dumps(config).encode()

    def refuse(size: weights.WeightsSize) -> None:
        assert size == weights.WeightsSize(HUB_ID, 500_000, int(500_000 * factor))
        raise NotEnoughSpace("too large")

    with pytest.raises(NotEnoughSpace, match="too large"):
        get(tmp_path / "cache", check_size=refuse)
    assert not any(".safetensors" in request for request in hub.requests)


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with the hub of the test; argv[1] is `folder`."""
    environment = {**os.environ, "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT}
    return subprocess.run(
        [sys.executable, "-c", script, str(folder / "cache")],
        env={**environment, "HF_HOME": str(folder / "hf"), "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )


RESOLVE = (
    "import sys; from pathlib import Path; from mlxroute import weights\n"
    "from mlxroute.catalog import Catalog; from mlxroute.types import no_notice, no_progress\n"
    f"print(weights.resolve({HUB_ID!r}, catalog=Catalog((), ()), cache_dir=Path(sys.argv[1]),"
    " offline=False, progress=no_progress, notify=no_notice).source)\n"
)


def test_a_download_from_hf_endpoint_starts_no_process_and_leaves_no_semaphores(
    hub: Site, tmp_path: Path
) -> None:
    # A Mac's start method, under which a semaphore needs a process that tracks it.
    program = (
        "import multiprocessing, os, psutil\n"
        "multiprocessing.set_start_method('spawn')\n"
        f"{RESOLVE}"
        "from mlxroute.weights import hub_listing\n"
        "print(hub_listing.find_problem(), psutil.Process().children(), flush=True)\n"
        "os._exit(0)\n"
    )
    process = run_script(program, tmp_path)
    assert process.stdout == f"hub {HUB_ID} at 01234567\nNone []\n", process.stderr
    assert process.stderr == ""
