"""``kvbm bench``: measure this machine, with the pure twin or memcpy in the same run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvbm.bench.machine import describe_machine
from kvbm.bench.report import bench_table
from kvbm.cli import check_json_file, write_json_file
from kvbm.config.sizes import parse_size
from kvbm.errors import ConfigError

_BENCHES = {
    "store": "reference: the pure twin on a tenth of the blocks; ratio: times faster",
    "hash": "reference: the pure twin; ratio: times faster",
    "copy": "reference: libc memcpy of the same blocks; ratio: ours / memcpy",
    "tiers": "reference: the pure twin, the bare copy, no offloading; ratio: above 1 is better than that",
    "disk": "reference: fio's best engine at the same block size, depth and directness; ratio: above 1 is better",
}


def bench(
    what: Annotated[str, typer.Argument(help="store, hash, copy, tiers or disk.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write machine and rows to this file.")] = None,
    path: Annotated[
        Path | None, typer.Option("--path", help="disk: directory on the disk to be measured; default: this one.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="disk: of the slab, and of fio's file; default: 2GiB.")
    ] = None,
    names: Annotated[
        str | None, typer.Option("--rows", help="disk: measure these rows only, separated by commas.")
    ] = None,
) -> None:
    """Measure the store, the hashing of tokens, copies between blocks, blocks between tiers, or the disk tier."""
    if what not in _BENCHES:
        raise ConfigError(f"there is no bench {what!r}, use {', '.join(_BENCHES)}")
    given = {"--path": path, "--size": size, "--rows": names}
    if what != "disk" and (foreign := [option for option, value in given.items() if value is not None]):
        raise ConfigError(f"{', '.join(foreign)} is for kvbm bench disk alone: leave it out")
    check_json_file(json_file)
    with Console(stderr=True).status(f"measuring {what}"):
        if what == "disk":
            rows = _measure_disk(path, size, names)
        else:
            rows = importlib.import_module(f"kvbm.bench.{what}").run()
    machine = describe_machine()
    title = f"{what}: {machine['processor']}, {machine['backend']} twin"
    Console().print(bench_table(title, _BENCHES[what], rows))
    options = "".join(f" {option} {value}" for option, value in given.items() if value is not None)
    write_json_file(json_file, {"machine": machine, "command": f"kvbm bench {what}{options}", "rows": rows})


def _measure_disk(path: Path | None, size: str | None, names: str | None) -> list[dict[str, Any]]:
    from kvbm.bench import disk  # it takes what a manager is made of

    given: dict[str, Any] = {"path": path}
    if size is not None:
        given["nbytes"] = parse_size(size)
    if names is not None:
        given["rows"] = tuple(name.strip() for name in names.split(",") if name.strip())
    return disk.run(disk.Extent(**given))
