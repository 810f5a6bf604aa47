"""`bench kernels`: time and error of the logit kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxroute.cli.flags import Save
from mlxroute.cli.folders import cache_dir_of
from mlxroute.config import Settings

if TYPE_CHECKING:
    from rich.console import Console


def kernels(
    settings: Settings,
    rounds: Annotated[int, typer.Option(help="Timings per implementation.", min=1)] = 30,
    save: Save = False,
) -> int:
    """Time the logit kernel against plain MLX operations.

    Also shows the error of each implementation against float64.
    """
    from mlxroute.backend import blas
    from mlxroute.cli.bench_report import check_save_option, write_report
    from mlxroute.cli.terminal import make_consoles, show_status

    check_save_option(save)
    _, err = make_consoles()
    blas.interpose(cache_dir_of(settings))
    from mlxroute.bench.kernel_cost import bench_kernels

    with show_status(err, "measuring"):
        report = bench_kernels(rounds=rounds)
    _print_kernels(report, err)
    return write_report(report, "kernels", save=save)


def _print_kernels(report: dict[str, Any], err: Console) -> None:
    from mlxroute.cli.terminal import make_table, print_table

    table = make_table("vocabulary", "form", "ms", "speed-up", "error to float64", "same top 8")
    for entry in report["kernels"]:
        for name, times in entry["ms"].items():
            ratio, error = entry["chain_over"].get(name), entry["error"].get(name)
            table.add_row(
                f"{entry['vocabulary']:,}",
                name,
                f"{times['median']:.3f}",
                f"{ratio['median']}x" if ratio else "",
                f"{error['entropy_nats']:.1e} nats" if error else "",
                ("yes" if error["same_top_ids"] else "NO") if error else "",
            )
    print_table(err, table)
    err.print(f"Metal: {report['metal']}", soft_wrap=True)
