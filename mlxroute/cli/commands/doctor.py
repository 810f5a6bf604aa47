"""`doctor`: check this machine, the settings and the server, in one report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxroute._version import __version__
from mlxroute.cli.error_advice import error_message, named_origins
from mlxroute.cli.exit_codes import EXIT_OK, EXIT_USAGE
from mlxroute.cli.folders import cache_dir_of
from mlxroute.cli.setting_options import load_all_settings
from mlxroute.config import (
    Settings,
    default_config_path,
    load_settings,
    read_never_send,
    read_prices,
)
from mlxroute.errors import MlxRouteError
from mlxroute.safe_text import error_text
from mlxroute.user_folders import cache_folder

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class DoctorCheck:
    """One line of the report.

    Args:
        name: What was checked.
        finding: The outcome in words.
        is_good: True for `ok`, False for `FAIL`, None where the finding is neither.
    """

    name: str
    finding: str
    is_good: bool | None = True


def load_despite_bad_config(flags: Mapping[str, Any]) -> Settings:
    """Return the settings; those of the flags alone if the config file or environment is bad.

    The error itself is a line of the report, and no connection is made.
    """
    try:
        return load_all_settings(flags)
    except MlxRouteError:
        return Settings(**{name: value for name, value in flags.items() if value is not None})


def doctor(settings: Settings) -> int:
    """Check device, memory, cache, settings, network and server."""
    from mlxroute.cli.terminal import make_consoles, print_labelled, show_status

    out, err = make_consoles()
    try:
        with named_origins(settings.origins):
            cache_dir = cache_dir_of(settings)
        cache_check = _check_cache(cache_dir)
    except MlxRouteError as exc:
        cache_dir = cache_folder()
        cache_check = DoctorCheck("cache", error_message(exc), is_good=False)
    checks = [_check_versions(), *_check_device(cache_dir), cache_check, _check_config()]
    if settings.offline:
        checks.append(DoctorCheck("network", "not checked: offline is set", is_good=None))
    elif not _are_settings_readable():
        # What cannot be read may be `offline`.
        finding = "not checked: the settings cannot be read"
        checks.append(DoctorCheck("network", finding, is_good=None))
    else:
        with show_status(err, "checking the network"):
            checks += [*_check_network(), *_check_running_servers()]
        checks.append(_check_large(settings, err))
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[check.is_good]
        print_labelled(out, f"{mark} {check.name:{width}}  ", check.finding)
    return EXIT_USAGE if any(check.is_good is False for check in checks) else EXIT_OK


def _check_versions() -> DoctorCheck:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    packages = []
    for name in ("mlx", "mlx-lm"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            return DoctorCheck("versions", f"{name} is not installed", is_good=False)
    python = f"Python {sys.version.split()[0]} on {platform.system()} {platform.machine()}"
    return DoctorCheck("versions", f"mlxroute {__version__}, {', '.join(packages)}, {python}")


def _check_device(cache_dir: Path) -> list[DoctorCheck]:
    from mlxroute.backend import blas, memory

    line = blas.interpose(cache_dir)
    checks = [_check_mlx()]
    if line:
        checks.append(DoctorCheck("BLAS", line.removeprefix("BLAS: ")))
    available = memory.available_bytes()
    text = f"{available / 2**30:.1f} GiB free"
    checks.append(DoctorCheck("memory", text, is_good=available > 2**30))
    return checks


def _check_mlx() -> DoctorCheck:
    try:
        import mlx.core as mx

        device = mx.default_device()
    except Exception as exc:  # noqa: BLE001
        return DoctorCheck("device", f"MLX cannot be used: {error_text(exc)}", is_good=False)
    return DoctorCheck("device", f"{device}, {os.cpu_count()} cores")


def _check_cache(cache_dir: Path) -> DoctorCheck:
    import shutil

    from mlxroute.weights import list_cached

    folder = cache_dir
    # `Path.exists` raises where a folder cannot be looked into.
    while not os.path.exists(folder):
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    models = ", ".join(sorted({entry.name for entry in list_cached(cache_dir)})) or "no models yet"
    is_writable = folder.is_dir() and os.access(folder, os.W_OK)
    text = f"{cache_dir}: {models}; {free / 1e9:.0f} GB free"
    return DoctorCheck(
        "cache", text if is_writable else f"{text}; not writable", is_good=is_writable
    )


def _check_config() -> DoctorCheck:
    try:
        path = default_config_path()
        settings = load_settings({}, environ=os.environ, path=path)
        read_never_send(settings)
        read_prices(settings)
    except MlxRouteError as exc:
        return DoctorCheck("config", error_message(exc), is_good=False)
    return DoctorCheck(
        "config", f"{path}" if path.exists() else f"{path} (no such file; defaults apply)"
    )


def _are_settings_readable() -> bool:
    try:
        load_all_settings({})
    except MlxRouteError:
        return False
    return True


def _check_network() -> list[DoctorCheck]:
    from mlxroute.weights import check_sources

    return [
        DoctorCheck(name, problem or "reachable", is_good=None if problem else True)
        for name, problem in check_sources().items()
    ]


def _check_running_servers() -> list[DoctorCheck]:
    from mlxroute.cli.server_offers import describe_server, use_command
    from mlxroute.large.negotiation.running_servers import DEFAULT_PORTS, find_running_servers

    ports = ", ".join(str(port) for port in sorted(DEFAULT_PORTS))
    return [
        DoctorCheck("servers here", f"{describe_server(server)}; try `{use_command(server)}`")
        for server in find_running_servers()
    ] or [DoctorCheck("servers here", f"none on the usual ports ({ports})", is_good=None)]


def _check_large(settings: Settings, err: Console) -> DoctorCheck:
    if settings.large is None:
        advice = "no server configured (give --large URL or set OPENAI_BASE_URL)"
        return DoctorCheck("large", advice, is_good=None)
    from mlxroute.cli.large_setup import first_reply_status, make_large, model_notes, open_ledger

    try:
        with (
            named_origins(settings.origins),
            open_ledger(settings) as ledger,
            make_large(settings, settings.large, ledger, err) as large,
            model_notes(large, err),
            first_reply_status(large, err, f"connecting to {large.base_url}"),
        ):
            return DoctorCheck("large", large.connect())
    except MlxRouteError as exc:
        return DoctorCheck("large", error_message(exc), is_good=False)
