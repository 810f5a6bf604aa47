"""`pull`: fetch a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxroute.cli.folders import cache_dir_of
from mlxroute.cli.shell_completion import complete_model
from mlxroute.config import Settings, user_catalog_dir
from mlxroute.errors import WeightsError


def pull(
    settings: Settings,
    name: Annotated[
        str,
        typer.Argument(
            help="Model: catalogue name, .gguf file or hub id.",
            metavar="NAME",
            autocompletion=complete_model,
        ),
    ],
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Fetch the GGUF file that llama.cpp serves.")
    ] = False,
) -> int:
    """Fetch a model into the cache and verify it."""
    from mlxroute.catalog import Catalog
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.terminal import make_consoles, print_note
    from mlxroute.weights import pull as pull_model

    out, err = make_consoles()
    try:
        with ByteProgress(err) as progress:
            local = pull_model(
                name,
                catalog=Catalog.load(user_catalog_dir()),
                cache_dir=cache_dir_of(settings),
                offline=settings.offline,
                progress=progress.progress,
                notify=progress.notify,
                as_gguf=gguf,
            )
    except WeightsError as error:
        if error.parameter != "engine":
            raise
        raise WeightsError(
            f"{name} has no GGUF file to fetch; leave out --gguf to fetch it for MLX"
        ) from error
    outcome = (
        "used as it is" if local.source in ("directory", "file") else f"verified ({local.source})"
    )
    print_note(err, f"{local.name}: {outcome}")
    out.print(str(local.path), soft_wrap=True)
    return 0
