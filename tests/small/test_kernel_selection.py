"""Which kernel runs, and the self-test that decides it on a machine with Metal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from mlxroute.errors import UsageError
from mlxroute.small.kernels import graph_kernel, metal_kernel, select_kernel, selection
from mlxroute.types import no_notice
from tests.metal.emulator import Emulator


@pytest.fixture(autouse=True)
def _fresh_self_test() -> Iterator[None]:
    selection._find_metal_fault.cache_clear()
    yield
    selection._find_metal_fault.cache_clear()


@pytest.fixture
def with_metal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Pretend that this machine has a Metal GPU, whose kernel is built by the given function."""

    def pretend(build_kernel: Callable[..., Any]) -> None:
        monkeypatch.setattr(selection, "_has_metal", lambda: True)
        monkeypatch.setattr(metal_kernel, "build_kernel", build_kernel)

    return pretend


def test_without_a_metal_gpu_the_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_has_metal", lambda: False)
    assert select_kernel("auto", notify=no_notice) is graph_kernel.pack_signals
    assert select_kernel("graph", notify=no_notice) is graph_kernel.pack_signals
    with pytest.raises(UsageError, match="no Metal GPU"):
        select_kernel("metal", notify=no_notice)
    with pytest.raises(UsageError, match="unknown kernel 'cuda'"):
        select_kernel("cuda", notify=no_notice)


def test_a_metal_kernel_that_passes_its_self_test_runs(
    with_metal: Callable[[Callable[..., Any]], None],
) -> None:
    emulator = Emulator()
    with_metal(emulator.kernel)
    assert select_kernel("auto", notify=no_notice) is metal_kernel.pack_signals
    assert select_kernel("metal", notify=no_notice) is metal_kernel.pack_signals
    # The self-test ran every form of the kernel in every type.
    for form in ("whole", "share", "merge"):
        for kind in ("float_", "bfloat16_t_", "float16_t_"):
            assert any(f"_signals_{form}__{kind}" in text for text in emulator.texts)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("id < than.id", "id > than.id"),
        # Only rows after the first one differ.
        ("size_t(row) * size_t(size)", "size_t(row) * size_t(k)"),
    ],
)
def test_a_wrong_metal_kernel_is_replaced_with_one_warning(
    with_metal: Callable[[Callable[..., Any]], None], right: str, wrong: str
) -> None:
    with_metal(Emulator(mutate=lambda text: text.replace(right, wrong)).kernel)
    lines: list[str] = []

    def notify(line: str) -> None:
        lines.append(line)

    assert select_kernel("auto", notify=notify) is graph_kernel.pack_signals
    assert len(lines) == 1
    assert "wrong on" in lines[0]
    with pytest.raises(UsageError, match="wrong on"):
        select_kernel("metal", notify=no_notice)


def test_a_metal_kernel_that_fails_is_replaced_with_one_warning(
    with_metal: Callable[[Callable[..., Any]], None],
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("the driver cannot compile it")

    with_metal(refuse)
    lines: list[str] = []

    def notify(line: str) -> None:
        lines.append(line)

    assert select_kernel("auto", notify=notify) is graph_kernel.pack_signals
    assert len(lines) == 1
    assert "failed on" in lines[0]
    assert "the driver cannot compile it" in lines[0]


def test_the_self_test_passes_the_graph_and_stops_a_kernel_that_forgets_the_sums() -> None:
    assert selection.find_fault(graph_kernel.pack_signals) is None

    def forgetful(logits: mx.array) -> mx.array:
        packed = graph_kernel.pack_signals(logits)
        return mx.concatenate([packed[:, :4], packed[:, 4:5] * 1.01, packed[:, 5:]], axis=-1)

    assert selection.find_fault(forgetful)
