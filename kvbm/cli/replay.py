"""``kvbm replay``: push a request trace through the real manager and its tiers, and print what came of it."""

from __future__ import annotations

import enum
import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kvbm
from kvbm.cli import check_json_file, check_output_file, write_json_file, write_output_file
from kvbm.cli.interrupts import Interrupts
from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.replay import ReplayReport, TraceRequest, generate_conversations, read_trace, replay_concurrently
from kvbm.replay import replay as run_replay
from kvbm.replay.html import need_matplotlib, render_page
from kvbm.replay.progress import ReplayProgress
from kvbm.replay.request import hashes_of
from kvbm.replay.run import OnServed
from kvbm.replay.warm_start import WarmStart
from kvbm.storage.object_store.address import check_url, safe_url
from kvbm.types import HashArray

_TOKENS_PER_BLOCK = 16
_CONCURRENCY = 8


class Clock(str, enum.Enum):
    """How requests that run at once are timed."""

    VIRTUAL = "virtual"
    REAL = "real"


@dataclass(frozen=True)
class _Schedule:
    """How requests follow one another."""

    concurrency: int  # 0: one after the other
    speed: float | None  # None: as fast as it goes

    def __str__(self) -> str:
        if not self.concurrency:
            return "one request after the other"
        clock = "virtual clock" if self.speed is None else f"real clock, {self.speed:g} times as fast"
        return f"{self.concurrency} requests at once, {clock}"


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Mooncake or agent-session trace, plain or .gz; without one, built-in conversations."),
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="Blocks of the device tier (G1).")] = 10_000,
    host: Annotated[int, typer.Option(min=0, help="Blocks of the host tier (G2); 0 leaves it out.")] = 0,
    disk: Annotated[int, typer.Option(min=0, help="Blocks of the disk tier (G3); 0 leaves it out.")] = 0,
    disk_path: Annotated[
        Path | None, typer.Option(help="Directory of the disk tier; default: a temporary one, removed at the end.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the replay that was interrupted in --disk-path.")
    ] = False,
    remote: Annotated[str | None, typer.Option(help="URL of the object store tier (G4); extra: s3.")] = None,
    block_bytes: Annotated[int, typer.Option(help="Bytes of a block.")] = 4096,
    policy: Annotated[str, typer.Option(help="Eviction policy: lru, fifo, or a plug-in's name.")] = "lru",
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="One request after the other, each until its offloads are done: same figures "
            "every time. With one tier it is so unless --concurrency or --clock real is given.",
        ),
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help=f"Requests at once otherwise; default {_CONCURRENCY}.")
    ] = None,
    clock: Annotated[
        Clock, typer.Option(help="virtual: in order of time, as fast as it goes; real: each request at its time.")
    ] = Clock.VIRTUAL,
    speed: Annotated[float | None, typer.Option(help="With --clock real, let time run so many times faster.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write a page with plots to this file (extra: report).")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Stop after so many requests.")] = None,
    backend: Annotated[str | None, typer.Option(help="Twin: auto, native or pure; default by KVBM_BACKEND.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Conversations of the built-in workload.")] = 200,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each of them.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the built-in workload.")] = 0,
) -> None:
    """Replay a request trace with real bytes: written on a miss, compared on every hit.

    Exit status: 0 when every byte was right, 1 after a wrong byte or a block that stayed held, 2 after bad input, 130
    after ctrl-C.
    """
    _check_block_bytes(block_bytes, is_built_in=trace is None)
    schedule = _schedule(sequential, concurrency, clock, speed, has_lower_tiers=bool(host or disk or remote))
    if disk_path is not None and not disk:
        raise ConfigError(f"--disk-path {disk_path} has no meaning without a disk tier: give --disk N too")
    if resume and disk_path is None:
        raise ConfigError("--resume goes on with a replay in the directory of its disk tier: give --disk-path DIR too")
    store = "" if remote is None else safe_url(check_url(remote))
    check_json_file(json_file)
    if report_file is not None:
        check_output_file("--report", report_file)
        need_matplotlib()
    workload: Iterable[TraceRequest]
    if trace is None:
        made = generate_conversations(num_sessions=sessions, num_turns=turns, seed=seed)
        workload, total = itertools.islice(made, requests), min(sessions * turns, requests or sessions * turns)
    else:
        workload = read = read_trace(trace, limit=requests)
        total = len(read)
        if schedule.concurrency:
            read.sort(key=lambda request: request.time_s)
    name = trace.name if trace else "built-in conversations"
    configuration = {
        "trace": name,
        **({} if trace else {"sessions, turns, seed": f"{sessions:,}, {turns:,}, {seed}"}),
        "tiers": _tiers({"device": device, "host": host, "disk": disk}, store),
        "bytes of a block": f"{block_bytes:,}",
        "eviction policy": policy,
        "schedule": str(schedule),
    }
    progress = None
    if disk_path is not None:
        settings = {**configuration, "requests": f"{total:,}", **({"content": _digest(trace)} if trace else {})}
        progress = ReplayProgress(disk_path, settings, num_requests=total, resume=resume)
        workload = progress.remaining(workload)
    report = ReplayReport()
    served: list[HashArray] = []
    with ExitStack() as stack:
        if disk and disk_path is None:
            disk_path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-replay-")))
        began = time.perf_counter()
        manager = stack.enter_context(
            BlockManager(
                num_layers=1,
                outer_dim=1,
                page_size=_TOKENS_PER_BLOCK if block_bytes % _TOKENS_PER_BLOCK == 0 else 1,
                inner_dim=block_bytes // _TOKENS_PER_BLOCK if block_bytes % _TOKENS_PER_BLOCK == 0 else block_bytes,
                dtype="uint8",
                device_blocks=device,
                host_blocks=host,
                disk_blocks=disk,
                disk_path=disk_path,
                remote_url=remote,
                policy=policy,
                model="replay",
                backend=backend,
            )
        )
        opening_s = time.perf_counter() - began
        num_restored = manager.disk.status().inactive if manager.disk is not None else 0
        if report_file is not None:
            workload = _note(manager, workload, served)
        if progress is not None:
            progress.begin(is_cold=not (num_restored or progress.num_skipped or remote))
            total -= progress.num_skipped
        try:
            _run(manager, workload, total, report, schedule, on_served=None if progress is None else progress.note)
        except KeyboardInterrupt:
            report.is_partial = True
        finally:
            if progress is not None:
                progress.end()
        twin = manager.backend.name
    if progress is not None:
        report.warm_start = WarmStart.of(
            progress, capacities=report.capacity_by_tier, restored_blocks=num_restored, seconds=opening_s
        )
    Console().print(report.to_table(escape(f"{name}, {configuration['tiers']}, {twin} twin")))
    write_json_file(json_file, report.to_dict())
    if report_file is not None:
        configuration["kvbm, twin"] = f"{kvbm.__version__}, {twin}"
        page = render_page(report, served, title=f"kvbm replay: {name}", configuration=configuration)
        write_output_file("--report", report_file, page)
    _exit(report)


def _check_block_bytes(block_bytes: int, *, is_built_in: bool) -> None:
    if block_bytes < 1:
        raise ConfigError(f"--block-bytes {block_bytes} is impossible, give 1 or more")
    if is_built_in and block_bytes % _TOKENS_PER_BLOCK:
        near = max(1, round(block_bytes / _TOKENS_PER_BLOCK)) * _TOKENS_PER_BLOCK
        raise ConfigError(
            f"--block-bytes {block_bytes} does not divide by the {_TOKENS_PER_BLOCK} tokens of a block of the built-in "
            f"conversations: give e.g. {near}, or a trace, which takes any"
        )


def _schedule(
    is_sequential: bool, concurrency: int | None, clock: Clock, speed: float | None, *, has_lower_tiers: bool
) -> _Schedule:
    if is_sequential and (concurrency is not None or clock is Clock.REAL):
        raise ConfigError("--sequential runs one request after the other: leave --concurrency and --clock real out")
    if speed is not None and clock is not Clock.REAL:
        raise ConfigError(f"--speed {speed:g} has no meaning with a virtual clock: give --clock real too")
    if speed is not None and not speed > 0:
        raise ConfigError(f"--speed {speed:g} is impossible, give more than 0")
    if clock is Clock.REAL:
        return _Schedule(concurrency or _CONCURRENCY, speed or 1.0)
    if is_sequential or (concurrency is None and not has_lower_tiers):
        return _Schedule(0, None)
    return _Schedule(concurrency or _CONCURRENCY, None)


def _note(manager: BlockManager, workload: Iterable[TraceRequest], served: list[HashArray]) -> Iterator[TraceRequest]:
    """Keep the hashes of the requests that fit, for the curve on the page."""
    for request in workload:
        hashes = hashes_of(manager, request)
        if len(hashes) <= manager.top.total_blocks:
            served.append(hashes)
        yield replace(request, hashes=hashes)


def _run(
    manager: BlockManager,
    workload: Iterable[TraceRequest],
    total: int,
    report: ReplayReport,
    schedule: _Schedule,
    *,
    on_served: OnServed | None,
) -> None:
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Interrupts() as interrupts, Progress(*columns, TextColumn("{task.fields[hit]}"), console=console) as progress:
        task = progress.add_task("replay", total=total, hit="")
        shown = 0

        def show(so_far: ReplayReport) -> None:
            nonlocal shown
            interrupts.check()
            num_requests = so_far.requests
            if num_requests - shown >= 50 or num_requests == total:
                shown = num_requests
                progress.update(task, completed=shown, hit=f"hit rate {so_far.hit_rate:.4f}")

        if schedule.concurrency:
            replay_concurrently(
                manager,
                workload,
                concurrency=schedule.concurrency,
                speed=schedule.speed,
                report=report,
                on_progress=show,
                on_served=on_served,
            )
        else:
            run_replay(manager, workload, report=report, on_progress=show, on_served=on_served)


def _tiers(num_blocks: dict[str, int], store: str) -> str:
    present = {tier: n for tier, n in num_blocks.items() if n}
    if len(present) == 1 and not store:
        return f"{next(iter(present.values())):,} blocks"
    return ", ".join(f"{tier} {n:,}" for tier, n in present.items()) + " blocks" + (f", {store}" if store else "")


def _digest(trace: Path) -> str:
    """Tell one trace from another of the same name."""
    with trace.open("rb") as file:
        digest = hashlib.blake2b(digest_size=8)
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _exit(report: ReplayReport) -> None:
    if report.wrong_bytes:
        Console(stderr=True).print(f"[red]{report.wrong_bytes} wrong bytes, first in {report.first_wrong}[/red]")
    if report.held_blocks:
        Console(stderr=True).print(f"[red]{report.held_blocks} blocks were never released[/red]")
    if report.is_failed:
        raise typer.Exit(1)
    if report.is_partial:
        raise typer.Exit(130)
