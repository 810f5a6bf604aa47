"""`doctor`: what this machine offers and what stands in the way, in one look."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlxroute._version import __version__
from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import (
    Settings,
    default_config_path,
    load_settings,
    read_never_send,
    read_prices,
)
from mlxroute.errors import ConfigError, MlxRouteError


@dataclass(frozen=True, slots=True)
class DoctorCheck:
    """One line of the report; `good` is None for what is merely worth knowing."""

    name: str
    finding: str
    good: bool | None = True


def run_doctor(settings: Settings) -> int:
    """Print every check; return 0 when nothing stands in the way, else 2."""
    from mlxroute.cli.terminal import consoles

    out, err = consoles()
    cache_dir = cache_dir_of(settings.cache_dir)
    checks = [_versions(), *_device(cache_dir), _disk(cache_dir), _config()]
    if settings.offline:
        checks.append(DoctorCheck("network", "not checked: offline is set", good=None))
    else:
        with err.status("asking the network"):
            checks += [*_network(), _large(settings)]
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[check.good]
        out.print(f"{mark} {check.name:{width}}  {check.finding}", soft_wrap=True, markup=False)
    return 2 if any(check.good is False for check in checks) else 0


def _versions() -> DoctorCheck:
    found = []
    for name in ("mlx", "mlx-lm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return DoctorCheck("versions", f"{name} is not installed", good=False)
    python = f"Python {sys.version.split()[0]} on {platform.system()} {platform.machine()}"
    return DoctorCheck("versions", f"mlxroute {__version__}, {', '.join(found)}, {python}")


def _device(cache_dir: Path) -> list[DoctorCheck]:
    from mlxroute.backend import blas, memory

    line = blas.interpose(cache_dir)
    import mlx.core as mx

    checks = [DoctorCheck("device", f"{mx.default_device()}, {os.cpu_count()} cores")]
    if line:
        checks.append(DoctorCheck("BLAS", line.removeprefix("BLAS: ")))
    available = memory.available_bytes()
    checks.append(
        DoctorCheck("memory", f"{available / 2**30:.1f} GiB free", good=available > 2**30)
    )
    return checks


def _disk(cache_dir: Path) -> DoctorCheck:
    from mlxroute.weights import list_cached

    folder = cache_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    models = ", ".join(sorted(entry.name for entry in list_cached(cache_dir))) or "no models yet"
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    text = f"{cache_dir}: {models}; {free / 1e9:.0f} GB free"
    return DoctorCheck("cache", text if writable else f"{text}; not writable", good=writable)


def _config() -> DoctorCheck:
    path = default_config_path()
    try:
        settings = load_settings({}, environ=os.environ, path=path)
        read_never_send(settings)
        read_prices(settings)
    except ConfigError as exc:
        return DoctorCheck("config", str(exc), good=False)
    return DoctorCheck("config", f"{path}" if path.exists() else f"{path} (none; defaults apply)")


def _network() -> list[DoctorCheck]:
    from mlxroute.weights import check_sources

    return [
        DoctorCheck(name, "reachable", good=True)
        if there
        else DoctorCheck(name, "not reachable", good=None)
        for name, there in check_sources().items()
    ]


def _large(settings: Settings) -> DoctorCheck:
    if settings.large is None:
        advice = "no server configured (give --large URL or set OPENAI_BASE_URL)"
        return DoctorCheck("large", advice, good=None)
    from mlxroute.cli.large_side import large_model
    from mlxroute.cli.session import open_ledger

    try:
        with (
            open_ledger(settings) as ledger,
            large_model(settings, settings.large, ledger) as large,
        ):
            return DoctorCheck("large", large.connect())
    except MlxRouteError as exc:
        return DoctorCheck("large", str(exc), good=False)
