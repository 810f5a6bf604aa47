"""The catalogue: shipped entries, the user's entries, and errors for wrong ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlxroute
from mlxroute.catalog import Catalog, shipped_dir
from mlxroute.errors import CatalogError
from mlxroute.types import Prices

MODEL = """
[[models]]
name = "mine"
license = "MIT"
parameters = 1
hub_id = "me/mine"
hub_bytes = 2
"""
PAIR = """
[[pairs]]
small = "qwen3-0.6b"
large = "qwen3-32b"
same_vocabulary = true
threshold = 1.0
calibration = ""
"""


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


def load(tmp_path: Path, text: str) -> Catalog:
    (tmp_path / "mine.toml").write_text(text)
    return Catalog.load(tmp_path)


def test_models_on_the_package_index_have_exact_sizes_and_versions(catalog: Catalog) -> None:
    sizes = {m.name: m.index.gguf_bytes for m in catalog.models if m.index is not None}
    assert sizes == {
        "smollm2-135m": 98_362_432,
        "qwen2.5-coder-0.5b": 491_400_064,
        "qwen2.5-coder-1.5b": 1_117_320_768,
    }
    for model in catalog.models:
        if model.index is not None:
            assert len(bytes.fromhex(model.index.gguf_sha256)) == 32
            assert all("==" in part.package for part in model.index.parts)


def test_there_are_pairs_for_large_machines(catalog: Catalog) -> None:
    large = {pair.large for pair in catalog.pairs if catalog.get_model(pair.large).parameters > 7e9}
    assert len(large) >= 5
    for pair in catalog.pairs:
        assert catalog.get_model(pair.small).parameters < catalog.get_model(pair.large).parameters


@pytest.mark.parametrize("large", ["qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b"])
def test_the_general_model_has_larger_partners_of_its_family(catalog: Catalog, large: str) -> None:
    pair = catalog.find_pair("qwen2.5-0.5b", large)
    assert pair is not None
    assert pair.same_vocabulary


def test_a_pair_is_found_by_both_names_or_by_the_small_models(catalog: Catalog) -> None:
    pair = catalog.find_pair("qwen2.5-coder-0.5b", "qwen2.5-coder-7b")
    assert pair is not None
    assert pair.name == "qwen2.5-coder-0.5b+qwen2.5-coder-7b"
    assert pair.same_vocabulary
    default = catalog.find_pair("qwen2.5-coder-0.5b")
    assert default is not None
    assert default.large == "qwen2.5-coder-1.5b"
    assert catalog.find_pair("qwen3-8b") is None


def test_an_unknown_name_gets_similar_names(catalog: Catalog) -> None:
    with pytest.raises(CatalogError, match=r"did you mean qwen3-8b.*see `mlxroute models`"):
        catalog.get_model("Qwen3-8")


def test_the_users_entries_follow_the_shipped_ones(tmp_path: Path, catalog: Catalog) -> None:
    pair = '[[pairs]]\nsmall = "mine"\nlarge = "qwen3-8b"\nsame_vocabulary = false\n'
    mine = load(tmp_path, MODEL + pair + 'threshold = 1\ncalibration = "by hand"\n')
    assert mine.models[:-1] == catalog.models
    assert mine.get_model("mine").hub_id == "me/mine"
    assert mine.pairs[-1].threshold == 1


def test_the_shipped_folder_beside_a_config_file_in_a_clone_is_read_once(
    tmp_path: Path, catalog: Catalog
) -> None:
    (tmp_path / "models").symlink_to(shipped_dir())
    for folder in (shipped_dir(), tmp_path / "models"):
        assert Catalog.load(folder) == catalog


def test_hidden_files_in_the_users_folder_are_ignored(tmp_path: Path) -> None:
    (tmp_path / ".#mine.toml").symlink_to("me@machine.1234:1")
    (tmp_path / "._mine.toml").write_bytes(b"\x00\x05\x16\x07")
    assert load(tmp_path, MODEL).get_model("mine").hub_id == "me/mine"


def test_the_title_of_an_older_entry_is_ignored(tmp_path: Path) -> None:
    assert load(tmp_path, MODEL + 'title = "Mine"\n') == load(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MODEL + 'size = "big"\n',
            r"mine.toml: models\[1\]: unknown key `size` \(known: hub_bytes,",
        ),
        ("[[model]]\n", r"mine.toml: unknown key `model` \(known: models, pairs\)"),
        (MODEL.replace("hub_bytes = 2\n", ""), r"models\[1\]: `hub_bytes` is missing"),
        (MODEL.replace("= 1\n", '= "1"\n'), r"`parameters` must be an integer, not '1'"),
        (MODEL.replace("= 1\n", "= 1.0\n"), r"`parameters` must be an integer, not 1\.0"),
        (MODEL.replace("= 1\n", "= true\n"), r"`parameters` must be an integer, not true"),
        (MODEL.replace('"mine"', '"qwen3-8b"'), "'qwen3-8b' is already defined"),
        (MODEL + MODEL, "'mine' is already defined"),
        (MODEL + "index = 1\n", r"models\[1\].index must be a table"),
        (
            MODEL + "[models.index]\ngguf_sha256 = ''\nconverted_bytes = 1\nparts = [{size = 1}]\n",
            r"index.parts\[1\]: unknown key `size`",
        ),
        (
            MODEL + "[models.index]\ngguf_sha256 = ''\nconverted_bytes = 1\nparts = []\n",
            "`parts` is empty",
        ),
        ("models = 3\n", "`models` must be a list of tables"),
        ("models = [", "not valid TOML"),
        (
            MODEL + PAIR.replace("qwen3-0.6b", "qwen3-8"),
            r"mine.toml: pairs\[1\]: `small`: no model named 'qwen3-8': did you mean qwen3-8b",
        ),
        (
            PAIR + PAIR.replace("qwen3-32b", "qwen3-8B"),
            r"mine.toml: pairs\[2\]: `large`: no model named 'qwen3-8B': did you mean qwen3-8b",
        ),
        (PAIR.replace("qwen3-32b", "zzzz"), r"pairs\[1\]: `large`: no model named 'zzzz'$"),
        (
            PAIR + 'router = "entropie"\n',
            r"mine.toml: pairs\[1\]: `router` must be one of entropy, .*, random, not 'entropie'",
        ),
    ],
)
def test_the_error_for_a_wrong_entry_names_its_file_and_key(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CatalogError, match=message):
        load(tmp_path, text)


def test_an_installed_package_contains_the_catalogue(tmp_path: Path) -> None:
    package = Path(mlxroute.__file__).parent
    installed = tmp_path / "mlxroute"
    shutil.copytree(package, installed, ignore=shutil.ignore_patterns("__pycache__"))
    (installed / "_models").mkdir()
    (installed / "_models" / "mine.toml").write_text(MODEL)
    script = "from mlxroute.catalog import Catalog; print([m.name for m in Catalog.load().models])"
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert process.stdout.strip() == "['mine']", process.stderr


def test_prices_are_found_by_catalogue_name_and_by_hub_id(tmp_path: Path) -> None:
    catalog = load(tmp_path, MODEL + "price = { input = 2, output = 8.0 }\n")
    assert catalog.find_prices("mine") == catalog.find_prices("me/mine") == Prices(2, 2, 8.0)
    assert catalog.find_prices("smollm2-135m") is None
    full = load(tmp_path, MODEL + "price = { input = 2, cached_input = 0.5, output = 8 }\n")
    assert full.find_prices("mine") == Prices(2, 0.5, 8)


@pytest.mark.parametrize(
    "price",
    [
        "3",
        "{ input = 1 }",
        "{ output = 1 }",
        '{ input = "1", output = 1 }',
        "{ input = true, output = 1 }",
        "{ input = -1, output = 1 }",
        "{ input = nan, output = 1 }",
        "{ input = 1, output = 1, cached = 1 }",
    ],
)
def test_the_error_for_a_wrong_price_names_the_entry(tmp_path: Path, price: str) -> None:
    with pytest.raises(CatalogError, match=r"models\[1\]\.price"):
        load(tmp_path, f"{MODEL}price = {price}\n")
