"""``kvbm bench``: measure this machine, with the pure twin or memcpy in the same run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvbm.bench.machine import describe_machine
from kvbm.bench.report import bench_table
from kvbm.cli import check_json_file, write_json_file
from kvbm.errors import ConfigError

_BENCHES = {
    "store": "reference: the pure twin on a tenth of the blocks; ratio: times faster",
    "hash": "reference: the pure twin; ratio: times faster",
    "copy": "reference: libc memcpy of the same blocks; ratio: ours / memcpy",
    "tiers": "reference: the pure twin, the bare copy, no offloading; ratio: above 1 is better than that",
}


def bench(
    what: Annotated[str, typer.Argument(help="store, hash, copy or tiers.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write machine and rows to this file.")] = None,
) -> None:
    """Measure the store, the hashing of tokens, copies between blocks, or what blocks between tiers cost."""
    if what not in _BENCHES:
        raise ConfigError(f"there is no bench {what!r}, use {', '.join(_BENCHES)}")
    check_json_file(json_file)
    with Console(stderr=True).status(f"measuring {what}"):
        rows = importlib.import_module(f"kvbm.bench.{what}").run()
    machine = describe_machine()
    title = f"{what}: {machine['processor']}, {machine['backend']} twin"
    Console().print(bench_table(title, _BENCHES[what], rows))
    write_json_file(json_file, {"machine": machine, "command": f"kvbm bench {what}", "rows": rows})
