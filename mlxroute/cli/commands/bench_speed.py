"""`bench speed`: local decoding compared with mlx_lm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxroute.cli.flags import Save
from mlxroute.cli.folders import cache_dir_of, model_file_name
from mlxroute.config import Settings, user_catalog_dir

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.cli.progress import ByteProgress
    from mlxroute.small import SmallModel

RANDOM = "random"


def speed(
    settings: Settings,
    pairs: Annotated[int, typer.Option(help="Number of answers by each of the two.", min=1)] = 10,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=2)] = 128,
    save: Save = False,
) -> int:
    """Compare local decoding with mlx_lm.

    `--small random` takes a tiny model with random weights.
    """
    import tempfile

    from mlxroute.catalog.head_files import find_head_file
    from mlxroute.cli.bench_report import check_save_option, read_builtin_prompts, write_report
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.cli.terminal import make_consoles, show_status

    check_save_option(save)
    _, err = make_consoles()
    with ByteProgress(err) as byte_progress, tempfile.TemporaryDirectory() as folder:
        small = _load_small(settings, byte_progress, Path(folder))
        if (head := find_head_file(small.name, user_catalog_dir())) is not None:
            small.load_head(head)
            # The head is timed separately.
            small.set_head(None)
        from mlxroute.bench.speed import bench_speed

        with show_status(err, "measuring") as status:

            def progress(label: str, done: int, total: int | None) -> None:
                status.update(f"measuring: answer {done} of {total}")

            report = bench_speed(
                small, read_builtin_prompts(), pairs=pairs, max_tokens=tokens, progress=progress
            )
    _print_speed(report, err)
    return write_report(report, f"speed-{model_file_name(small.name)}", save=save)


def _load_small(settings: Settings, progress: ByteProgress, folder: Path) -> SmallModel:
    """Load the small model of the settings; for `random` write a tiny one to the folder."""
    if settings.small != RANDOM:
        from mlxroute.cli.small_setup import load_small

        return load_small(settings, progress)
    from mlxroute.backend import blas

    blas.interpose(cache_dir_of(settings))
    from mlxroute.backend.load import load
    from mlxroute.bench.random_model import write_random_model
    from mlxroute.small import SmallModel

    model, tokenizer = load(write_random_model(folder / RANDOM))
    return SmallModel(model, tokenizer, name=RANDOM, kernel=settings.kernel)


def _print_speed(report: dict[str, Any], err: Console) -> None:
    from mlxroute.cli.terminal import make_table, print_table

    table = make_table("figure (median)", "mlxroute", "mlx_lm", "ratio", title=report["small"])
    ours, theirs = report["mlxroute"], report["mlx_lm"]
    ratio_keys = {"tokens_per_s": "ratio_tokens_per_s", "ttft_s": "ratio_ttft"}
    for key in ours:
        ratio = report[ratio_keys[key]] if key in ratio_keys else None
        table.add_row(
            key,
            str(ours[key]["median"]),
            str(theirs[key]["median"]),
            f"{ratio['median']} ({ratio['min']} to {ratio['max']})" if ratio else "",
        )
    for entry in report["by_context"]:
        table.add_row(
            f"step_s after {entry['context']} tokens",
            str(entry["mlxroute_step_s"]["median"]),
            str(entry["mlx_lm_step_s"]["median"]),
            str(entry["ratio_tokens_per_s"]["median"]),
        )
    print_table(err, table)
    same = "the same tokens" if report["same_tokens"] else "DIFFERENT TOKENS"
    parts = f"kernel and router take {report['router_share_of_step']:.2%} of a step"
    if (share := report["head_share_of_step"]) is not None:
        parts += f", the learned head {share:.2%}"
    err.print(f"{same}; {parts}")
