"""``kvbm disk``: look into a slab, compare its blocks with their checksums, or forget what it holds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kvbm.cli.interrupts import Interrupts
from kvbm.errors import ConfigError, KvbmError, SlabFormatError
from kvbm.storage.disk.inspection import SlabInspection, inspect_slab
from kvbm.storage.disk.reader import SlabName, SlabReader, find_slabs
from kvbm.storage.disk.scrub import MISMATCH, ScrubReport, SlabScrub

_MAX_NAMED = 1000  # bad blocks in JSON
_BAR_WIDTH = 24

_Path = Annotated[Path, typer.Argument(help="Directory of slabs (disk.path), or one slab's NAME.index.")]
_Slab = Annotated[str | None, typer.Option("--slab", help="This slab of the directory only; default: all of them.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    help="Look into the slabs of a disk tier, verify them, or clear them.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def inspect(path: _Path, slab: _Slab = None, as_json: _Json = False) -> None:
    """Show what a slab holds, and how old it is.

    Header, occupancy, damage, ages and priorities. Reads only, beside a manager that holds the slab too.
    """
    found = [inspect_slab(name) for name in find_slabs(path, slab)]
    if as_json:
        typer.echo(json.dumps({"slabs": [inspection.to_dict() for inspection in found]}, indent=2))
    else:
        for inspection in found:
            _show(inspection)
    if any(inspection.problem for inspection in found):
        raise typer.Exit(2)


@app.command()
def verify(
    path: _Path,
    slab: _Slab = None,
    drop: Annotated[bool, typer.Option("--drop", help="Forget bad blocks: void their records in the end.")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that read and compute checksums.")] = 4,
    as_json: _Json = False,
) -> None:
    """Read every block and compare its checksum.

    Needs the slab for itself. Exits with 1 where something is bad.
    """
    slabs = find_slabs(path, slab)
    reports: dict[str, ScrubReport] = {}
    problems: dict[str, str] = {}
    begun: list[SlabScrub] = []
    console = Console(stderr=True)
    columns = (TextColumn("verifying {task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with (
        Interrupts() as interrupts,
        Progress(
            *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
        ) as progress,
    ):
        try:
            for name in slabs:
                interrupts.check()
                try:
                    with SlabScrub(name) as scrub:
                        begun.append(scrub)
                        reports[name.name] = _scrub(scrub, drop, threads, progress, interrupts.check)
                except (KvbmError, OSError) as error:
                    problems[name.name] = str(error)
        except KeyboardInterrupt:
            num_dropped = sum(scrub.num_dropped for scrub in begun)
            what = f"{num_dropped:,} records were dropped" if num_dropped else "nothing was changed"
            console.print(f"interrupted: {what}", highlight=False)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps({"slabs": [_values(name, reports, problems) for name in slabs]}, indent=2))
    else:
        for name in slabs:
            if name.name in reports:
                Console(soft_wrap=True).print(_tell(name, reports[name.name], drop), markup=False, highlight=False)
    for name in slabs:
        if name.name in problems:
            text = f"kvbm: {_plain(problems[name.name])}"
            Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False, highlight=False)
    if problems:
        raise typer.Exit(2)
    if not all(report.is_good for report in reports.values()):
        raise typer.Exit(1)


@app.command()
def clear(
    path: _Path,
    slab: _Slab = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forget every block of a slab.

    On the medium when it returns. Needs the slab for itself. The files keep their size.
    """
    with ExitStack() as stack:
        held: list[SlabScrub] = []
        for name in find_slabs(path, slab):  # all of them before one is cleared
            try:
                held.append(stack.enter_context(SlabScrub(name)))
            except SlabFormatError:
                with SlabReader(name) as reader:
                    if reader.is_foreign:  # it holds blocks, for another version of this package
                        raise
                typer.echo(f"{_plain(str(name))} has no whole header: nothing in it is found anyway")
        num_blocks = sum(scrub.num_blocks for scrub in held)
        if not held:
            return
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError("kvbm disk clear asks, and nobody is there to answer: give --yes")
            names = _plain(", ".join(str(scrub.slab) for scrub in held))
            if not typer.confirm(f"forget {num_blocks:,} blocks of {names}?", err=True):
                typer.echo("nothing was changed")
                raise typer.Exit(1)
        for scrub in held:
            scrub.clear()
            typer.echo(f"{_plain(str(scrub.slab))}: {scrub.num_blocks:,} blocks forgotten")


# -- inspect ---------------------------------------------------------------------------------------------------


def _show(found: SlabInspection) -> None:
    console = Console()
    table = Table(title=escape(_plain(f"slab {found.name} in {found.directory}")), show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for what, value in _facts(found):
        table.add_row(what, escape(_plain(value)))
    console.print(table)
    parts: list[tuple[str, dict[Any, int]]] = [
        ("last used", found.used),
        ("written", found.written),
        ("priority", found.priorities),
        ("blocks in a chain", found.chains),
    ]
    if not found.num_blocks:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("", "", "blocks", ""):
        table.add_column(name, justify="right" if name else "left")
    full = "█" if console.encoding.startswith("utf") else "#"
    for title, counts in parts:
        highest = max(counts.values(), default=0)
        for i, (name, n) in enumerate(counts.items()):
            bar = full * max(n > 0, round(_BAR_WIDTH * n / highest)) if highest else ""
            table.add_row(title if i == 0 else "", str(name), f"{n:,}", bar)
        table.add_row()
    console.print(table)


def _facts(found: SlabInspection) -> list[tuple[str, str]]:
    holder = f"process {found.holder}" if found.holder else "a process that cannot be named here"
    facts = [("held by", holder if found.is_held else "nobody")]
    if found.problem:
        return [("problem", found.problem), *facts]
    slots = found.num_slots
    damage = f"{found.num_damaged:,} of {slots:,}"
    facts += [
        ("format", f"version {found.version}, {found.num_whole_headers} of 2 header copies whole"),
        ("made at", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.made_at))),
        ("generation", f"{found.generation:,} (rises when all is forgotten)"),
        *((("fingerprint" if i == 0 else ""), part) for i, part in enumerate(found.fingerprint or ("none",))),
        ("blocks", f"{found.num_blocks:,} in {slots:,} slots, {found.occupancy:.1%} occupied"),
        ("damaged records", damage if found.num_damaged else "none"),
        ("bytes of a block", f"{found.block_nbytes:,} in a slot of {found.slot_nbytes:,}"),
        ("bytes of blocks", f"{found.num_blocks * found.block_nbytes:,}"),
        ("data file", f"{found.data_nbytes:,} bytes, {found.data_medium_nbytes:,} of them allocated"),
        ("index file", f"{found.index_nbytes:,} bytes"),
    ]
    if found.num_duplicates:
        facts.append(("further copies of a block", f"{found.num_duplicates:,}"))
    if found.num_headless:
        facts.append(("blocks whose parent is not here", f"{found.num_headless:,}"))
    if found.missing_nbytes:
        facts.append(("problem", f"the files are {found.missing_nbytes:,} bytes too short: what lay there is lost"))
    return facts


# -- verify ----------------------------------------------------------------------------------------------------


def _scrub(
    scrub: SlabScrub, drop: bool, num_threads: int, progress: Progress, check: Callable[[], None]
) -> ScrubReport:
    task = progress.add_task(escape(_plain(scrub.slab.name)), total=scrub.num_blocks * scrub.header.block_nbytes)

    def advance(_: int, nbytes: int) -> None:
        check()
        progress.update(task, advance=nbytes)

    return scrub.run(drop=drop, num_threads=num_threads, on_progress=advance)


def _values(name: SlabName, reports: dict[str, ScrubReport], problems: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "directory": str(name.directory), "name": name.name, "problem": problems.get(name.name, "")
    }  # fmt: skip
    if (report := reports.get(name.name)) is None:
        return values
    bad = zip(report.slots.tolist(), report.hashes, report.outcomes.tolist(), strict=True)
    return {
        **values,
        "num_blocks": report.num_blocks,
        "num_bad": len(report.slots),
        "num_mismatches": report.num_mismatches,
        "num_unreadable": report.num_unreadable,
        "num_damaged": report.num_damaged,
        "num_dropped": report.num_dropped,
        "nbytes": report.nbytes,
        "seconds": report.seconds,
        "gigabytes_per_second": _speed(report),
        "io_mode": report.io_mode,
        "error": report.error,
        "bad": [
            {"slot": slot, "hash": words.tobytes().hex(), "reason": _reason(outcome)}
            for slot, words, outcome in list(bad)[:_MAX_NAMED]
        ],
    }


def _tell(name: SlabName, report: ScrubReport, drop: bool) -> str:
    lines = [
        f"{name}: {report.num_blocks:,} blocks read ({report.io_mode}), {report.nbytes / 1e9:,.2f} GB in "
        f"{report.seconds:,.1f} s, {_speed(report):.2f} GB/s"
    ]
    if report.is_good:
        return _plain(f"{lines[0]}: all good")
    lines.append(
        f"{report.num_mismatches:,} blocks differ from their checksum, {report.num_unreadable:,} cannot be read, "
        f"{report.num_damaged:,} records are damaged"
    )
    shown: Sequence[int] = report.slots[:10].tolist()
    if len(shown):
        more = f" and {len(report.slots) - len(shown):,} more" if len(report.slots) > len(shown) else ""
        lines.append(f"bad slots: {', '.join(map(str, shown))}{more}")
    if report.error:
        lines.append(f"first error: {report.error}")
    lines.append(
        f"{report.num_dropped:,} records dropped"
        if drop
        else "nothing was changed: bad blocks are never served, --drop forgets them now"
    )
    return "\n".join(map(_plain, lines))


def _speed(report: ScrubReport) -> float:
    return report.nbytes / report.seconds / 1e9 if report.seconds else 0.0


def _reason(outcome: int) -> str:
    return "mismatch" if outcome == MISMATCH else "unreadable"


def _plain(text: str) -> str:
    """Show what would steer a terminal as what it is; names and fingerprints come from files."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
