"""Free memory within the limit of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxroute.backend import memory


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cache"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_page_cache_of_a_container_is_free_memory(
    folder: str,
    limit: str,
    used: str,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {limit: f"{30 << 20}\n", used: f"{29 << 20}\n", "memory.stat": f"{cache} {9 << 20}\n"}
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes() == 10 << 20
