"""``kvbm bench``: measure this machine, with the pure twin or memcpy in the same run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvbm.bench.machine import describe_machine
from kvbm.bench.report import bench_table
from kvbm.cli import check_json_file, check_output_file, write_json_file
from kvbm.config.sizes import parse_size
from kvbm.errors import ConfigError

_BENCHES = {
    "store": "reference: the pure twin on a tenth of the blocks; ratio: times faster",
    "hash": "reference: the pure twin; ratio: times faster",
    "copy": "reference: libc memcpy of the same blocks; ratio: ours / memcpy",
    "tiers": "reference: the pure twin, the bare copy, no offloading; ratio: above 1 is better than that",
    "disk": "reference: fio's best engine at the same block size, depth and directness; ratio: above 1 is better",
    "gpu": "reference: one large plain copy of pinned memory, in the same run",
}
_TAKERS = {
    "--path": ("disk",),
    "--size": ("disk", "gpu"),
    "--rows": ("disk", "gpu"),
    "--plot": ("gpu",),
    "--bars": ("gpu",),
}


def bench(
    what: Annotated[str, typer.Argument(help="store, hash, copy, tiers, disk or gpu.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write machine and rows to this file.")] = None,
    path: Annotated[
        Path | None, typer.Option("--path", help="disk: directory on the disk to be measured; default: this one.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", help="disk: of the slab, and of fio's file; default: 2GiB. gpu: of the largest batch; 1GiB."
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--rows", help="disk: measure these rows only, separated by commas. gpu: those whose names begin so."
        ),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="gpu: draw the copies into this PNG file; needs matplotlib.")
    ] = None,
    needs_bars: Annotated[
        bool, typer.Option("--bars", help="gpu: exit with 1 where a figure does not reach its bar.")
    ] = False,
) -> None:
    """Measure the store, the hashing of tokens, copies between blocks, blocks between tiers, the disk, or the GPU."""
    if what not in _BENCHES:
        raise ConfigError(f"there is no bench {what!r}, use {', '.join(_BENCHES)}")
    given = {"--path": path, "--size": size, "--rows": names, "--plot": plot_file, "--bars": needs_bars or None}
    foreign = [option for option, value in given.items() if value is not None and what not in _TAKERS[option]]
    if foreign:
        takers = "; ".join(f"{option} is for kvbm bench {' and '.join(_TAKERS[option])} alone" for option in foreign)
        raise ConfigError(f"{takers}: leave it out")
    check_json_file(json_file)
    options = "".join(
        f" {option}" if value is True else f" {option} {value}" for option, value in given.items() if value is not None
    )
    command = f"kvbm bench {what}{options}"
    if what == "gpu":
        _bench_gpu(command, size, names, plot_file, json_file, needs_bars=needs_bars)
        return
    with Console(stderr=True).status(f"measuring {what}"):
        if what == "disk":
            rows = _measure_disk(path, size, names)
        else:
            rows = importlib.import_module(f"kvbm.bench.{what}").run()
    machine = describe_machine()
    title = f"{what}: {machine['processor']}, {machine['backend']} twin"
    Console().print(bench_table(title, _BENCHES[what], rows))
    write_json_file(json_file, {"machine": machine, "command": command, "rows": rows})


def _measure_disk(path: Path | None, size: str | None, names: str | None) -> list[dict[str, Any]]:
    from kvbm.bench import disk  # it takes what a manager is made of

    given: dict[str, Any] = {"path": path}
    if size is not None:
        given["nbytes"] = parse_size(size)
    if names is not None:
        given["rows"] = _names_in(names)
    return disk.run(disk.Extent(**given))


def _bench_gpu(
    command: str,
    size: str | None,
    names: str | None,
    plot_file: Path | None,
    json_file: Path | None,
    *,
    needs_bars: bool,
) -> None:
    from kvbm.bench import gpu, gpu_show  # they ask for a driver

    check_output_file("--plot", plot_file)
    if plot_file is not None:
        gpu_show.need_matplotlib()
    found = gpu.find()
    if found.is_simulated:
        typer.echo(f"kvbm: {gpu.SIMULATED_NOTE}", err=True)
    given: dict[str, Any] = {}
    if size is not None:
        given["most_nbytes"] = parse_size(size)
    if names is not None:
        given["rows"] = _names_in(names)
        if not given["rows"]:
            raise ConfigError(f"--rows names no row: their names begin with {', '.join(gpu.GROUPS)}")
    with Console(stderr=True).status(f"measuring {found.device.name}"):
        figures = gpu.run(gpu.extent_for(found, **given), gpu=found)
    console = Console()
    for table in gpu_show.tables_of(figures):
        console.print(table)
    for note in figures.notes:
        typer.echo(note)
    if plot_file is not None:
        try:
            gpu_show.draw(figures, plot_file)
        except OSError as error:
            raise ConfigError(f"--plot {plot_file} cannot be written: {error.strerror or error}") from error
    write_json_file(
        json_file,
        {
            "machine": describe_machine(),
            "device": figures.device,
            "is_simulated": figures.is_simulated,
            "notes": figures.notes,
            "command": command,
            "rows": figures.rows,
        },
    )
    if needs_bars and not figures.is_simulated and gpu.missed_bars(figures.rows):
        raise typer.Exit(1)  # the figures are kept, and the line above names what misses its bar


def _names_in(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
