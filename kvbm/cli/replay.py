"""``kvbm replay``: push a request trace through the real manager and print what came of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvbm.cli import check_json_file, write_json_file
from kvbm.cli.interrupts import Interrupts
from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.replay import ReplayReport, TraceRequest, generate_conversations, read_trace
from kvbm.replay import replay as run_replay

_TOKENS_PER_BLOCK = 16


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Mooncake or agent-session trace, plain or .gz; without one, built-in conversations."),
    ] = None,
    device: Annotated[int, typer.Option(help="Blocks of the device tier (G1).")] = 10_000,
    host: Annotated[int, typer.Option(help="Blocks of the host tier (G2); must be 0 in this version.")] = 0,
    disk: Annotated[int, typer.Option(help="Blocks of the disk tier (G3); must be 0 in this version.")] = 0,
    block_bytes: Annotated[int, typer.Option(help="Bytes of a block.")] = 4096,
    policy: Annotated[str, typer.Option(help="Eviction policy: lru, fifo, or a plug-in's name.")] = "lru",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="One request after the other; with one tier it always is so.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many requests.")] = None,
    backend: Annotated[str | None, typer.Option(help="Twin: auto, native or pure; default by KVBM_BACKEND.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Conversations of the built-in workload.")] = 200,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each of them.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the built-in workload.")] = 0,
) -> None:
    """Replay a request trace with real bytes: written on a miss, compared on every hit.

    Exit status: 0 when every byte was right, 1 after a wrong byte, 2 after bad input, 130 after ctrl-C.
    """
    del sequential  # one tier has nothing that runs beside the requests
    if block_bytes < 1:
        raise ConfigError(f"--block-bytes {block_bytes} is impossible, give 1 or more")
    check_json_file(json_file)
    workload: Iterable[TraceRequest]
    if trace is None:
        made = generate_conversations(num_sessions=sessions, num_turns=turns, seed=seed)
        workload, total = itertools.islice(made, requests), min(sessions * turns, requests or sessions * turns)
    else:
        workload = read = read_trace(trace, limit=requests)
        total = len(read)
    report = ReplayReport()
    with BlockManager(
        num_layers=1,
        outer_dim=1,
        page_size=_TOKENS_PER_BLOCK if block_bytes % _TOKENS_PER_BLOCK == 0 else 1,
        inner_dim=block_bytes // _TOKENS_PER_BLOCK if block_bytes % _TOKENS_PER_BLOCK == 0 else block_bytes,
        dtype="uint8",
        device_blocks=device,
        host_blocks=host,
        disk_blocks=disk,
        policy=policy,
        model="replay",
        backend=backend,
    ) as manager:
        try:
            _run(manager, workload, total, report)
        except KeyboardInterrupt:
            report.is_partial = True
        twin = manager.backend.name
    _finish(report, f"{trace.name if trace else 'built-in conversations'}, {device:,} blocks, {twin} twin", json_file)


def _run(manager: BlockManager, workload: Iterable[TraceRequest], total: int, report: ReplayReport) -> None:
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Interrupts() as interrupts, Progress(*columns, TextColumn("{task.fields[hit]}"), console=console) as progress:
        task = progress.add_task("replay", total=total, hit="")

        def show(so_far: ReplayReport) -> None:
            interrupts.check()
            if so_far.requests % 50 == 0 or so_far.requests == total:
                progress.update(task, completed=so_far.requests, hit=f"hit rate {so_far.hit_rate:.4f}")

        run_replay(manager, workload, report=report, on_progress=show)


def _finish(report: ReplayReport, title: str, json_file: Path | None) -> None:
    Console().print(report.to_table(escape(title)))
    write_json_file(json_file, report.to_dict())
    if report.wrong_bytes:
        Console(stderr=True).print(f"[red]{report.wrong_bytes} wrong bytes, first in {report.first_wrong}[/red]")
        raise typer.Exit(1)
    if report.is_partial:
        raise typer.Exit(130)
