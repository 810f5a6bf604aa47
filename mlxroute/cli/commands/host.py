"""`host`: serve a large model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from mlxroute.cli.folders import cache_dir_of, host_log
from mlxroute.cli.shell_completion import complete_model
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import LaunchError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.weights import LocalModel

# Far longer than any load takes: whoever waits for the model can press Ctrl-C.
_LOAD_LIMIT_S: Final = 86_400.0


def host(
    settings: Settings,
    name: Annotated[
        str | None,
        typer.Argument(
            help="Model to serve: catalogue name, .gguf file or hub id. Default: the largest"
            " partner of the default small model that fits and is a small download.",
            metavar="NAME",
            autocompletion=complete_model,
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on. Default: a free one.", min=1, max=65535)
    ] = None,
) -> int:
    """Serve a model on this machine, with mlx_lm.server or llama.cpp."""
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.terminal import make_consoles, print_note
    from mlxroute.hosting.launcher import LocalServer, check_port

    out, err = make_consoles()
    check_port(port)
    cache_dir = cache_dir_of(settings)
    local = _fetch(name, settings, err)
    with LocalServer.launch(
        local.path,
        cache_dir=cache_dir,
        port=port,
        log_path=host_log(cache_dir),
        skip_memory_check=settings.skip_memory_check,
    ) as server:
        with ByteProgress(err) as progress:
            server.wait_until_ready(timeout_s=_LOAD_LIMIT_S, progress=progress.progress)
        # Scripts read the address, so it is the only line on stdout.
        out.print(server.url, soft_wrap=True)
        print_note(
            err,
            f"serving {local.name}; try `mlxroute chat --large {server.url}` in another"
            " terminal; Ctrl-C stops the server",
        )
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return 0
    raise LaunchError(f"the server ended by itself (exit code {code}; log: {server.log_path})")


def _fetch(name: str | None, settings: Settings, err: Console) -> LocalModel:
    """Fetch the model, by default the largest that fits; raise NotEnoughSpace if it does not."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.model_fit import check_fits, default_host_model, measure_machine
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.small_setup import default_small
    from mlxroute.hosting.server_choice import check_llama_cpp
    from mlxroute.weights import resolve

    catalog = Catalog.load(user_catalog_dir())
    machine = measure_machine(settings)
    if name is None:
        name = default_host_model(catalog, machine, small=default_small()).name
    as_gguf, model = machine.serves_gguf(name, catalog), catalog.find_model(name)
    if as_gguf:
        check_llama_cpp()
    # A model without a GGUF file is refused by `resolve`, whatever its size.
    if model is not None and not (as_gguf and model.index is None):
        check_fits(model, catalog, machine)
    with ByteProgress(err) as progress:
        return resolve(
            name,
            catalog=catalog,
            cache_dir=cache_dir_of(settings),
            offline=settings.offline,
            progress=progress.progress,
            notify=progress.notify,
            as_gguf=as_gguf,
            check_size=machine.require_memory,
        )
