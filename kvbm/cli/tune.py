"""``kvbm tune``: measure which way of copying is fastest on this machine's GPU, and remember it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kvbm.cli import check_json_file, write_json_file
from kvbm.errors import ConfigError
from kvbm.gpu import describe_gpu, find_gpu
from kvbm.transfer.choose import PATHS
from kvbm.transfer.tuning import Measured, measure, save_table, shapes

_GIB = 1 << 30


def tune(
    index: Annotated[int, typer.Option("--index", min=0, help="Which GPU, as CUDA numbers them.")] = 0,
    num_repeats: Annotated[int, typer.Option("--repeats", min=1, help="Copies of each kind; the median counts.")] = 7,
    thread_blocks: Annotated[
        int, typer.Option("--thread-blocks", min=0, help="Of a kernel at most; 0 takes a few, as copies do.")
    ] = 0,
    most_mib: Annotated[int, typer.Option("--most-mib", min=1, help="MiB of the largest copy.")] = 256,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Print the table and keep nothing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure the ways of copying blocks to and from the GPU, print them, and let later managers use the fastest."""
    check_json_file(json_file)
    gpu = find_gpu(index=index)
    if gpu is None:
        raise ConfigError(f"there is nothing to tune: {describe_gpu(index=index)}")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task("measuring", total=len(shapes(most_nbytes=most_mib << 20)))

        def advance(measured: Measured) -> None:
            progress.update(task, advance=1, description=f"{measured.direction} {measured.run_nbytes >> 10} KiB")

        rows = measure(
            gpu,
            num_repeats=num_repeats,
            most_nbytes=most_mib << 20,
            num_thread_blocks=thread_blocks,
            on_cell=advance,
        )
    Console().print(_table(gpu.describe(), rows))
    if not is_dry:
        path = save_table(gpu, tuple(row.cell() for row in rows))
        typer.echo(f"kept in {path}; managers that start from now on use it")
    write_json_file(
        json_file,
        {
            "device": gpu.describe(),
            "rows": [
                {"direction": r.direction, "run_nbytes": r.run_nbytes, "num_runs": r.num_runs, "seconds": r.seconds}
                for r in rows
            ],
        },
    )


def _table(title: str, rows: list[Measured]) -> Table:
    table = Table(title=f"GiB/s, the fastest marked: {title}")
    for name in ("direction", "run KiB", "runs", *PATHS):
        table.add_column(name, justify="left" if name == "direction" else "right")
    for row in rows:
        fastest = row.cell().paths[0]
        speeds = [_speed(row, path) + (" *" if path == fastest else "") for path in PATHS]
        table.add_row(row.direction, str(row.run_nbytes >> 10), f"{row.num_runs:,}", *speeds)
    return table


def _speed(row: Measured, path: str) -> str:
    seconds = row.seconds.get(path)
    if seconds is None:
        return "-"
    return f"{row.nbytes / seconds / _GIB:.1f}" if seconds > 0 else "?"
