"""Free memory within the limits of containers and of groups of processes."""

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


@pytest.mark.parametrize(
    ("folder", "limit", "used", "own"),
    [
        ("", "memory.max", "memory.current", "0::/user.slice/job.scope"),
        (
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "9:name=systemd:/other\n4:cpu,memory:/user.slice/job.scope\n0::/",
        ),
    ],
    ids=["v2", "v1"],
)
@pytest.mark.parametrize(("own_left", "parent_left"), [(5, 7), (7, 5)])
def test_the_least_limit_of_the_groups_of_a_process_counts(
    own_left: int,
    parent_left: int,
    folder: str,
    limit: str,
    used: str,
    own: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = tmp_path / folder / "user.slice"
    for group, left in ((parent / "job.scope", own_left), (parent, parent_left)):
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{30 << 20}\n")
        (group / used).write_text(f"{(30 - left) << 20}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    assert memory.available_bytes() == 5 << 20


def test_a_group_that_a_container_does_not_see_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("0::/../elsewhere\nnot a group\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    assert memory.available_bytes() > 5 << 20
