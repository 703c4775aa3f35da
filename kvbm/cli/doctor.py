"""``kvbm doctor``: whether an engine with our connector would be safe here, found out before it serves anybody."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbm.cli import check_json_file, write_json_file
from kvbm.config.sizes import parse_size
from kvbm.engines.doctor.examine import examine
from kvbm.engines.doctor.findings import Finding, State, exit_status
from kvbm.engines.doctor.setup import make_setup, make_transfer, read_object, read_transfer
from kvbm.errors import ConfigError

_COLOURS = {State.OK: "green", State.NOTE: "dim", State.WARNING: "yellow", State.UNSAFE: "red"}
_WORDS = {
    0: "safe",
    1: "safe, with warnings",
    2: "unsafe: do not serve before what is marked so is mended",
}


class EngineName(str, enum.Enum):
    """Engines that the doctor knows."""

    VLLM = "vllm"


def doctor(
    engine: Annotated[EngineName, typer.Option(help="The engine that is going to be connected.")] = EngineName.VLLM,
    model: Annotated[
        str, typer.Option(help="As the engine gets it: its own KV layout is looked at, no weights are read.")
    ] = "",
    transfer_config: Annotated[
        str | None,
        typer.Option("--kv-transfer-config", help="The JSON that the engine gets, or @FILE; it says all of the tiers."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Without that JSON: size of the host tier (G2), as 20GiB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Size of the disk tier (G3).")] = None,
    disk_path: Annotated[Path | None, typer.Option(help="Directory of the disk tier.")] = None,
    remote: Annotated[str | None, typer.Option(help="URL of the object store tier (G4); extra: s3.")] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Size of the engine's own KV memory on one rank, to compare the host tier with.")
    ] = None,
    engine_args: Annotated[
        str | None,
        typer.Option(help='Further arguments of the engine, JSON or @FILE: {"block_size": 64, "dtype": "bfloat16"}.'),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the engine may take.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file.")] = None,
) -> None:
    """Start the engine's cache in a child process, send golden blocks through every tier, and look at the machine.

    Exit status: 0 safe, 1 with warnings, 2 unsafe (or bad input). Tiers get little room at the same places; nothing
    that lies there is touched.
    """
    check_json_file(json_file)
    tiers = {"--host": host, "--disk": disk, "--disk-path": disk_path, "--remote": remote}
    given = [option for option, value in tiers.items() if value is not None]
    if transfer_config is not None and given:
        raise ConfigError(f"--kv-transfer-config says all of the tiers: leave {', '.join(given)} out")
    if transfer_config is not None:
        transfer = read_transfer(transfer_config)
    else:
        transfer = make_transfer(host, disk, disk_path, remote)
    setup = make_setup(
        transfer,
        engine={} if engine_args is None else read_object("--engine-args", engine_args),
        model=model,
        device_nbytes=None if kv_cache_memory is None else parse_size(kv_cache_memory),
    )
    with Console(stderr=True).status(f"examining {engine.value} with {model or 'a tiny model'}"):
        findings = examine(setup, timeout_s=timeout)
    status = exit_status(findings)
    Console().print(_table(findings))
    console = Console(soft_wrap=True)
    console.print(_WORDS[status], style=("green", "yellow", "red")[status], highlight=False)
    if transfer_config is None:
        typer.echo(f"the flag for the engine: --kv-transfer-config '{json.dumps(transfer)}'")
    values = {"engine": engine.value, "model": model, "status": status}
    write_json_file(json_file, {**values, "findings": [finding.to_dict() for finding in findings]})
    if status:
        raise typer.Exit(status)


def _table(findings: list[Finding]) -> Table:
    table = Table(title="kvbm doctor")
    table.add_column("what")
    table.add_column("state")
    for name in ("found", "what to do"):
        table.add_column(name, overflow="fold")
    for one in findings:
        state = f"[{_COLOURS[one.state]}]{one.state.value}[/]"
        table.add_row(
            *map(escape, (_plain(one.subject),)), state, escape(_plain(one.found)), escape(_plain(one.advice))
        )
    return table


def _plain(text: str) -> str:
    """Show what would steer a terminal as what it is; some of it was written by the child."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
