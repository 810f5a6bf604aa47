"""Which models fit into how much memory."""

from __future__ import annotations

import pytest

from mlxroute.catalog import Catalog
from mlxroute.cli.model_fit import check_fits, default_host_model, demo_pairs, resident_bytes
from mlxroute.cli.small_setup import default_small
from mlxroute.errors import NotEnoughSpace

GIB = 2**30
CATALOG = Catalog.load()
GENERAL, INDEXED = "qwen2.5-0.5b", "qwen2.5-coder-0.5b"


def test_a_cpu_demo_takes_the_largest_pair_that_comes_from_the_package_index() -> None:
    best = demo_pairs(CATALOG, small=INDEXED, available=24 * GIB, dense=True)[0]
    assert best.name == "qwen2.5-coder-0.5b+qwen2.5-coder-1.5b"


@pytest.mark.parametrize("gib", [6, 8, 16, 64])
def test_a_gpu_demo_fits_in_memory_and_has_a_small_download(gib: int) -> None:
    for pair in demo_pairs(CATALOG, small=GENERAL, available=gib * GIB, dense=False):
        models = [CATALOG.get_model(pair.small), CATALOG.get_model(pair.large)]
        assert sum(resident_bytes(model, dense=False) for model in models) <= gib * GIB
        assert sum(model.hub_bytes for model in models) <= 6e9
        assert pair.same_vocabulary


def test_a_demo_that_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(NotEnoughSpace, match=r"needs \d+\.\d GiB .* and 2\.0 GiB are free"):
        demo_pairs(CATALOG, small=INDEXED, available=2 * GIB, dense=True)


def test_a_demo_prefers_the_default_small_model_to_a_larger_large_one() -> None:
    pairs = demo_pairs(CATALOG, small=GENERAL, available=64 * GIB, dense=False)
    assert pairs[0].name == "qwen2.5-0.5b+qwen2.5-7b"
    sizes = [CATALOG.get_model(pair.large).parameters for pair in pairs]
    assert sizes[1] == max(sizes) > sizes[0]


@pytest.mark.parametrize(
    ("platform", "name"), [("darwin", GENERAL), ("linux", INDEXED), ("win32", INDEXED)]
)
def test_only_a_mac_starts_with_the_general_model(
    platform: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert default_small() == name
    assert CATALOG.find_pair(name) is not None


@pytest.mark.parametrize(
    ("small", "gib", "dense", "served"),
    [
        (INDEXED, 24, True, "qwen2.5-coder-1.5b"),
        (INDEXED, 4, True, "qwen2.5-coder-0.5b"),
        (GENERAL, 24, False, "qwen2.5-7b"),
        (INDEXED, 24, False, "qwen2.5-coder-7b"),
    ],
)
def test_a_server_takes_a_partner_of_the_small_model_or_the_largest_that_fits(
    small: str, gib: int, dense: bool, served: str
) -> None:
    model = default_host_model(CATALOG, small=small, available=gib * GIB, dense=dense)
    assert model.name == served


def test_a_server_without_a_model_that_fits_is_refused() -> None:
    with pytest.raises(NotEnoughSpace, match=r"smollm2-135m needs .* GiB are free"):
        default_host_model(CATALOG, small=INDEXED, available=GIB // 2, dense=True)


def test_a_model_that_does_not_fit_is_refused_with_a_smaller_choice() -> None:
    with pytest.raises(
        NotEnoughSpace, match=r"needs 122\.6 GiB .* 8\.0 GiB are free; .* would fit"
    ):
        check_fits(CATALOG.get_model("qwen3-32b"), CATALOG, available=8 * GIB, dense=True)
    check_fits(CATALOG.get_model("qwen3-8b"), CATALOG, available=8 * GIB, dense=False)
