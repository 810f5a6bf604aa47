"""Which models fit into how much memory."""

from __future__ import annotations

import pytest

from mlxroute.catalog import Catalog
from mlxroute.cli.model_fit import Machine, check_fits, default_host_model, demo_pairs
from mlxroute.cli.small_setup import default_small
from mlxroute.errors import NotEnoughSpace

GIB = 2**30
CATALOG = Catalog.load()
GENERAL, INDEXED = "qwen2.5-0.5b", "qwen2.5-coder-0.5b"


def cpu(gib: float, *, engine: str = "auto") -> Machine:
    return Machine(True, int(gib * GIB), engine)


def gpu(gib: float, *, engine: str = "auto") -> Machine:
    return Machine(False, int(gib * GIB), engine)


def test_a_cpu_demo_takes_the_largest_pair_that_comes_from_the_package_index() -> None:
    best = demo_pairs(CATALOG, cpu(24), small=INDEXED)[0]
    assert best.name == "qwen2.5-coder-0.5b+qwen2.5-coder-1.5b"


@pytest.mark.parametrize("gib", [6, 8, 16, 64])
def test_a_gpu_demo_fits_in_memory_and_has_a_small_download(gib: int) -> None:
    machine = gpu(gib)
    for pair in demo_pairs(CATALOG, machine, small=GENERAL):
        models = [CATALOG.get_model(pair.small), CATALOG.get_model(pair.large)]
        assert sum(machine.loaded_bytes(model) for model in models) <= gib * GIB
        assert sum(model.hub_bytes for model in models) <= 6e9
        assert pair.same_vocabulary


def test_a_demo_that_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(NotEnoughSpace, match=r"needs \d+\.\d GiB .* and 2\.0 GiB are free"):
        demo_pairs(CATALOG, cpu(2), small=INDEXED)


def test_a_demo_prefers_the_default_small_model_to_a_larger_large_one() -> None:
    pairs = demo_pairs(CATALOG, gpu(64), small=GENERAL)
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
    ("small", "machine", "served"),
    [
        (INDEXED, cpu(24, engine="mlx"), "qwen2.5-coder-1.5b"),
        (INDEXED, cpu(4, engine="mlx"), "qwen2.5-coder-0.5b"),
        (INDEXED, cpu(4), "qwen2.5-coder-1.5b"),
        (GENERAL, gpu(24), "qwen2.5-7b"),
        (INDEXED, gpu(24), "qwen2.5-coder-7b"),
        (INDEXED, gpu(24, engine="llama.cpp"), "qwen2.5-coder-1.5b"),
    ],
)
def test_a_server_takes_a_partner_of_the_small_model_or_the_largest_that_fits(
    small: str, machine: Machine, served: str
) -> None:
    assert default_host_model(CATALOG, machine, small=small).name == served


def test_a_server_without_a_model_that_fits_is_refused() -> None:
    with pytest.raises(NotEnoughSpace, match=r"smollm2-135m needs .* GiB are free"):
        default_host_model(CATALOG, cpu(0.5), small=INDEXED)


def test_a_model_that_does_not_fit_is_refused_with_a_smaller_choice() -> None:
    with pytest.raises(
        NotEnoughSpace, match=r"needs 122\.6 GiB .* 8\.0 GiB are free; .* would fit"
    ):
        check_fits(CATALOG.get_model("qwen3-32b"), CATALOG, cpu(8))
    check_fits(CATALOG.get_model("qwen3-8b"), CATALOG, gpu(8))


def test_llama_cpp_serves_gguf_where_mlx_has_no_gpu_or_where_it_is_chosen() -> None:
    assert cpu(8).serves_gguf(INDEXED, CATALOG)
    assert cpu(8).serves_gguf("mine.gguf", CATALOG)
    assert not cpu(8).serves_gguf("qwen3-8b", CATALOG)
    assert not cpu(8).serves_gguf("some-org/model", CATALOG)
    assert not cpu(8, engine="mlx").serves_gguf(INDEXED, CATALOG)
    assert not gpu(8).serves_gguf(INDEXED, CATALOG)
    assert gpu(8, engine="llama.cpp").serves_gguf(INDEXED, CATALOG)


def test_a_gguf_file_takes_about_its_size_of_memory() -> None:
    model = CATALOG.get_model("qwen2.5-coder-1.5b")
    assert cpu(8).served_bytes(model) < 2.1e9
    assert cpu(8, engine="mlx").served_bytes(model) > 7e9
