"""`host`: a server for people who have none."""

from __future__ import annotations

from pathlib import Path

from mlxroute.catalog import Catalog
from mlxroute.cli.folders import cache_dir_of
from mlxroute.cli.model_fit import check_fits, host_choice
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import LaunchError


def run_host(name: str | None, settings: Settings, *, port: int | None) -> int:
    """Serve a model until interrupted; its address is the one line on stdout."""
    from mlxroute.cli.progress import Reporter
    from mlxroute.cli.terminal import consoles
    from mlxroute.hosting.launcher import LocalServer
    from mlxroute.weights import resolve

    out, err = consoles()
    cache_dir = cache_dir_of(settings.cache_dir)
    catalog = Catalog.load(user_catalog_dir())
    dense, available = device_room(cache_dir)
    if name is None:
        name = host_choice(catalog, available=available, dense=dense).name
    if (model := catalog.find_model(name)) is not None:
        check_fits(model, catalog, available=available, dense=dense)
    with Reporter(err) as reporter:
        local = resolve(
            name,
            catalog=catalog,
            cache_dir=cache_dir,
            offline=settings.offline,
            progress=reporter.progress,
            notify=reporter.notify,
        )
    with LocalServer.launch(
        local.path, cache_dir=cache_dir, port=port, log_path=host_log(cache_dir)
    ) as server:
        with Reporter(err) as reporter:
            server.wait_until_ready(progress=reporter.progress)
        out.print(server.url, soft_wrap=True)
        err.print(
            f"serving {local.name}; try `mlxroute chat --large {server.url}` in another"
            " terminal; Ctrl-C stops the server",
            style="dim",
            markup=False,
        )
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return 0
    raise LaunchError(f"the server ended by itself (exit code {code}; log: {server.log_path})")


def device_room(cache_dir: Path) -> tuple[bool, int]:
    """Whether weights run dense here (CPU backend), and the free memory in bytes."""
    from mlxroute.backend import blas, memory
    from mlxroute.backend.load import on_cpu

    blas.interpose(cache_dir)
    return on_cpu(), memory.available_bytes()


def host_log(cache_dir: Path) -> Path:
    """The log file of the local server."""
    return cache_dir / "logs" / "host.log"
