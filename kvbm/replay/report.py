"""What a replay found: counts, rates and times, as a table for people and as JSON for scripts.

Threads add what they did with one request at a time; one lock guards all of it. Its size is bounded, whatever the
length of the trace.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from kvbm.manager import BlockManager
from kvbm.replay.series import Point, Samples, Series
from kvbm.types import Tier

if TYPE_CHECKING:
    from kvbm.replay.warm_start import WarmStart

_MIN_GROWTH = 2  # of a tier that holds copies of the one above

CALLS = ("match", "onboard", "allocate", "register", "release", "flush")


@dataclass
class Served:
    """What came of one request.

    Attributes
    ----------
    blocks, hit_blocks : int
        Of the request, and those of them whose bytes were there.
    hits_by_tier : dict of str to int
        Blocks found, by the tier they were found in.
    refused : str
        Why it was not served: "" it was, "too_large" for the top tier, "no_room" within its time.
    """

    blocks: int = 0
    hit_blocks: int = 0
    hits_by_tier: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    written_bytes: int = 0
    verified_bytes: int = 0
    wrong_bytes: int = 0
    first_wrong: str = ""
    call_ns: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class ReplayReport:
    """Counters that a replay fills as it goes; its methods may be called from any thread."""

    requests: int = 0
    refused: int = 0  # requests larger than the top tier
    no_room: int = 0  # requests that found no room in time
    blocks: int = 0  # of the requests that were served
    hit_blocks: int = 0
    lost_blocks: int = 0  # found in a tier, but late, damaged or unreadable on the way up
    hits_by_tier: Counter[str] = field(default_factory=Counter)
    evictions_by_tier: dict[str, int] = field(default_factory=dict)
    routes: dict[str, dict[str, Any]] = field(default_factory=dict)  # "device->host" -> blocks, nbytes, drops, present
    mismatches: int = 0  # blocks that did not match their checksum
    capacity_by_tier: dict[str, int] = field(default_factory=dict)
    occupied_by_tier: dict[str, int] = field(default_factory=dict)
    held_blocks: int = 0  # that nobody released by the end
    written_bytes: int = 0
    verified_bytes: int = 0
    wrong_bytes: int = 0
    first_wrong: str = ""  # the first block with a wrong byte
    seconds: float = 0.0  # spent on requests: the manager's calls, making and comparing bytes
    is_partial: bool = False  # interrupted
    warm_start: WarmStart | None = None  # where the disk tier held something when the replay began
    call_ns: dict[str, Samples] = field(default_factory=lambda: {call: Samples() for call in CALLS})
    series: Series = field(default_factory=Series)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, served: Served, *, seconds: float = 0.0, until: float = 0.0) -> bool:
        """Add a request; return whether `take_point` is due.

        Parameters
        ----------
        served : Served
        seconds : float
            That it took, where requests come one after the other.
        until : float
            Seconds since the start when it ended, where they run at once.
        """
        with self._lock:
            self.requests += 1
            self.seconds = max(self.seconds + seconds, until)
            self.refused += served.refused == "too_large"
            self.no_room += served.refused == "no_room"
            self.blocks += served.blocks
            self.hit_blocks += served.hit_blocks
            self.lost_blocks += sum(served.hits_by_tier.values()) - served.hit_blocks
            self.hits_by_tier.update(served.hits_by_tier)
            self.written_bytes += served.written_bytes
            self.verified_bytes += served.verified_bytes
            self.wrong_bytes += served.wrong_bytes
            self.first_wrong = self.first_wrong or served.first_wrong
            for call, elapsed_ns in served.call_ns:
                self.call_ns[call].add(elapsed_ns)
            return self.series.is_due(self.requests)

    def take_point(self, manager: BlockManager) -> None:
        """Note how far the replay is and how full the tiers are."""
        occupied = {tier: status.active + status.inactive for tier, status in manager.status().items()}
        with self._lock:
            self.series.add(Point(self.requests, self.seconds, self.blocks, dict(self.hits_by_tier), occupied))

    @property
    def hit_rate(self) -> float:
        """Leading cached blocks of each request over all blocks."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def hit_rate_by_tier(self) -> dict[str, float]:
        """Blocks found in each tier over all blocks; together the hit rate, but for blocks lost on the way up."""
        tiers = self.capacity_by_tier or self.hits_by_tier
        return {tier: self.hits_by_tier[tier] / self.blocks if self.blocks else 0.0 for tier in tiers}

    @property
    def evictions(self) -> int:
        """Blocks evicted, of every tier."""
        return sum(self.evictions_by_tier.values())

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes written and verified over the whole time, hashing and comparing included."""
        return (self.written_bytes + self.verified_bytes) / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def warnings(self) -> list[str]:
        """What about the sizes of the tiers keeps them from helping."""
        present = [(tier, size) for tier, size in self.capacity_by_tier.items() if size]
        return [
            f"{lower} has {size:,} blocks, {upper} above it {above:,}: it holds copies of what lies there, so it adds "
            f"{f'at most {size - above:,}' if size > above else 'nothing'}; give it twice as many or more"
            for (upper, above), (lower, size) in itertools.pairwise(present)
            if size < _MIN_GROWTH * above
        ]

    @property
    def is_failed(self) -> bool:
        """Whether something was wrong that no workload can excuse: a wrong byte, or a block that stayed held."""
        return bool(self.wrong_bytes or self.held_blocks)

    def percentile_us(self, call: str, percent: float) -> float:
        """Time of one manager call, in microseconds."""
        times = self.call_ns[call].values()
        return float(np.percentile(times, percent)) / 1000 if len(times) else 0.0

    @property
    def calls(self) -> list[str]:
        """Calls that were made, in the order of a request."""
        return [call for call in CALLS if len(self.call_ns[call])]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as ``--json`` writes them."""
        return {
            "requests": self.requests,
            "blocks": self.blocks,
            "hit_blocks": self.hit_blocks,
            "hit_rate": self.hit_rate,
            "hit_rate_by_tier": self.hit_rate_by_tier,
            "lost_blocks": self.lost_blocks,
            "refused": self.refused,
            "no_room": self.no_room,
            "wrong_bytes": self.wrong_bytes,
            "first_wrong": self.first_wrong,
            "held_blocks": self.held_blocks,
            "mismatches": self.mismatches,
            "evictions": self.evictions,
            "evictions_by_tier": self.evictions_by_tier,
            "capacity_by_tier": self.capacity_by_tier,
            "occupied_by_tier": self.occupied_by_tier,
            "routes": self.routes,
            "written_bytes": self.written_bytes,
            "verified_bytes": self.verified_bytes,
            "gigabytes_per_second": self.gigabytes_per_second,
            "seconds": self.seconds,
            "is_partial": self.is_partial,
            "warnings": self.warnings,
            "warm_start": None if self.warm_start is None else self.warm_start.to_dict(),
            "call_us": {
                call: {"p50": self.percentile_us(call, 50), "p99": self.percentile_us(call, 99)} for call in CALLS
            },
            "series": self.series.to_dict(),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Give the figures as text, each with its name."""
        rates = self.hit_rate_by_tier
        rows = [
            ("requests", f"{self.requests:,}"),
            ("refused (larger than the top tier)", f"{self.refused:,}"),
            *([("refused (no room in time)", f"{self.no_room:,}")] if self.no_room else []),
            ("blocks", f"{self.blocks:,}"),
            ("hit blocks", f"{self.hit_blocks:,}"),
            ("hit rate", f"{self.hit_rate:.4f}"),
            *([(f"found in {tier}", f"{rate:.4f}") for tier, rate in rates.items()] if len(rates) > 1 else []),
            *([("found, but lost on the way up", f"{self.lost_blocks:,}")] if self.lost_blocks else []),
            *(
                (f"{route}, blocks / bytes", f"{counts['blocks']:,} / {amount(counts['nbytes'])}")
                for route, counts in self.routes.items()
            ),
            *(
                (f"{route}, dropped: {reason.replace('_', ' ')}", f"{num_blocks:,}")
                for route, counts in self.routes.items()
                for reason, num_blocks in counts["dropped"].items()
            ),
            *([("checksum mismatches", f"{self.mismatches:,}")] if self.mismatches else []),
            (
                " / ".join(["evictions" if len(rates) < 2 else "evictions from device", *list(rates)[1:]]),
                " / ".join(f"{num_blocks:,}" for num_blocks in self.evictions_by_tier.values()),
            ),
            ("bytes written / verified", f"{amount(self.written_bytes)} / {amount(self.verified_bytes)}"),
            ("speed, making and comparing included", f"{self.gigabytes_per_second:.2f} GB/s"),
            ("time", f"{self.seconds:.2f} s"),
        ]
        for call in self.calls:
            times = f"{self.percentile_us(call, 50):,.1f} / {self.percentile_us(call, 99):,.1f} us"
            rows.append((f"{call}, p50 / p99", times))
        return rows + ([] if self.warm_start is None else self.warm_start.rows())

    def to_table(self, title: str) -> Table:
        """Give a table for a terminal."""
        table = Table(title=f"{title} (interrupted)" if self.is_partial else title, show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        for what, value in self.rows():
            table.add_row(what, value)
        if self.held_blocks:
            table.add_row("blocks still held", f"[red]{self.held_blocks:,}[/red]")
        for warning in self.warnings:
            table.add_row("[yellow]warning[/yellow]", f"[yellow]{warning}[/yellow]")
        color = "red" if self.wrong_bytes else "green"
        table.add_row("wrong bytes", f"[{color}]{self.wrong_bytes:,}[/{color}]")
        return table


class Baseline:
    """Counts of a manager when a replay began: what was before is not the replay's.

    Parameters
    ----------
    manager : BlockManager
    """

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._status = manager.status()
        self._statistics = manager.statistics()

    def conclude(self, report: ReplayReport) -> None:
        """Fill in what the manager's own counters tell."""
        status, statistics = self._manager.status(), self._manager.statistics()
        before = self._statistics
        report.capacity_by_tier = {tier: now.total_blocks for tier, now in status.items()}
        report.occupied_by_tier = {tier: now.active + now.inactive for tier, now in status.items()}
        report.evictions_by_tier = {tier: now.evictions - self._status[tier].evictions for tier, now in status.items()}
        report.mismatches = statistics.mismatches.total() - before.mismatches.total()
        is_moving = any(counts.in_flight for counts in statistics.routes.values())  # which holds blocks by right
        held = [now.total_blocks - now.free - now.inactive for now in status.values()]
        held_before = [then.total_blocks - then.free - then.inactive for then in self._status.values()]
        report.held_blocks = 0 if report.is_partial or is_moving else max(0, sum(held) - sum(held_before))
        order = list(Tier)
        for key in sorted(statistics.routes, key=lambda route: (order.index(route[0]), order.index(route[1]))):
            now, then = statistics.routes[key], before.route(*key)
            report.routes["->".join(tier.value for tier in key)] = {
                "blocks": now.blocks - then.blocks,
                "nbytes": now.nbytes - then.nbytes,
                "present": now.present - then.present,
                "dropped": dict(now.dropped - then.dropped),
            }


def amount(nbytes: int) -> str:
    """Give a number of bytes as text for people."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
