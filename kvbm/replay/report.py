"""What a replay found: counts, rates and times, as a table for people and as JSON for scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

CALLS = ("match", "allocate", "register", "release")


@dataclass
class ReplayReport:
    """Counters that a replay fills as it goes."""

    requests: int = 0
    refused: int = 0  # requests larger than the tier
    blocks: int = 0  # of the requests that were not refused
    hit_blocks: int = 0
    hits_by_tier: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    written_bytes: int = 0
    verified_bytes: int = 0
    wrong_bytes: int = 0
    first_wrong: str = ""  # the first block with a wrong byte
    seconds: float = 0.0  # spent on requests: the manager's calls, making and comparing bytes
    is_partial: bool = False  # interrupted
    call_ns: dict[str, list[int]] = field(default_factory=lambda: {call: [] for call in CALLS})

    @property
    def hit_rate(self) -> float:
        """Leading cached blocks of each request over all blocks."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes written and verified over the whole time, hashing and comparing included."""
        return (self.written_bytes + self.verified_bytes) / self.seconds / 1e9 if self.seconds else 0.0

    def percentile_us(self, call: str, percent: float) -> float:
        """Time of one manager call, in microseconds."""
        times = self.call_ns[call]
        return float(np.percentile(times, percent)) / 1000 if times else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as ``--json`` writes them."""
        return {
            "requests": self.requests,
            "blocks": self.blocks,
            "hit_blocks": self.hit_blocks,
            "hit_rate": self.hit_rate,
            "hit_rate_by_tier": {
                tier: hits / self.blocks if self.blocks else 0.0 for tier, hits in self.hits_by_tier.items()
            },
            "refused": self.refused,
            "wrong_bytes": self.wrong_bytes,
            "first_wrong": self.first_wrong,
            "evictions": self.evictions,
            "written_bytes": self.written_bytes,
            "verified_bytes": self.verified_bytes,
            "gigabytes_per_second": self.gigabytes_per_second,
            "seconds": self.seconds,
            "is_partial": self.is_partial,
            "call_us": {
                call: {"p50": self.percentile_us(call, 50), "p99": self.percentile_us(call, 99)} for call in CALLS
            },
        }

    def to_table(self, title: str) -> Table:
        """Give a table for a terminal."""
        table = Table(title=f"{title} (interrupted)" if self.is_partial else title, show_header=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        rows = [
            ("requests", f"{self.requests:,}"),
            ("refused (larger than the tier)", f"{self.refused:,}"),
            ("blocks", f"{self.blocks:,}"),
            ("hit blocks", f"{self.hit_blocks:,}"),
            ("hit rate", f"{self.hit_rate:.4f}"),
            ("evictions", f"{self.evictions:,}"),
            ("bytes written / verified", f"{_gigabytes(self.written_bytes)} / {_gigabytes(self.verified_bytes)}"),
            ("speed, making and comparing included", f"{self.gigabytes_per_second:.2f} GB/s"),
            ("time", f"{self.seconds:.2f} s"),
        ]
        for call in CALLS:
            times = f"{self.percentile_us(call, 50):.1f} / {self.percentile_us(call, 99):.1f} us"
            rows.append((f"{call}, p50 / p99", times))
        for what, value in rows:
            table.add_row(what, value)
        color = "red" if self.wrong_bytes else "green"
        table.add_row("wrong bytes", f"[{color}]{self.wrong_bytes:,}[/{color}]")
        return table


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
