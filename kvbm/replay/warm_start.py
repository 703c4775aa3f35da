"""What a replay found in tiers that held something when it began: what a restart is worth.

Beside it stands what the same requests would have found in empty tiers, from their reuse distances, and what the first
requests of the trace did find when every tier was empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvbm.replay.progress import WINDOW_REQUESTS, ReplayProgress
from kvbm.replay.reuse import reuse_curve

DISK = "disk"


@dataclass(frozen=True)
class WarmStart:
    """A replay that began with blocks on disk.

    Attributes
    ----------
    restored_blocks : int
        That the disk tier held when it was opened.
    seconds : float
        To open the tiers and to restore those.
    skipped_requests : int
        Done by earlier runs.
    window_requests : int
        Requests that the rates below are of: the first ones after the start.
    rates, empty_rates : dict of str to float
        Share of the blocks of those that was found in each tier; and that would have been, had all tiers been empty.
    cold_rates : dict of str to float, optional
        What the first requests of the trace found, where a run began with empty tiers.
    whole_hit_rate : float
        Of this run and those before, as far as it has come.
    """

    restored_blocks: int
    seconds: float
    skipped_requests: int
    window_requests: int
    rates: dict[str, float]
    empty_rates: dict[str, float]
    cold_rates: dict[str, float] | None
    whole_hit_rate: float

    @classmethod
    def of(
        cls, progress: ReplayProgress, *, capacities: Mapping[str, int], restored_blocks: int, seconds: float
    ) -> WarmStart | None:
        """Tell of a run that has ended; None where it began with nothing.

        Parameters
        ----------
        progress : ReplayProgress
        capacities : dict of str to int
            Blocks of each tier, from the top down.
        restored_blocks : int
        seconds : float
        """
        if not restored_blocks and not progress.num_skipped:
            return None
        curve = reuse_curve(progress.window_hashes())
        empty_rates, above = {}, 0.0
        for tier, capacity in capacities.items():
            rate = max(above, float(curve.hit_rates(capacity)))
            empty_rates[tier], above = rate - above, rate
        cold = progress.cold
        return cls(
            restored_blocks=restored_blocks,
            seconds=seconds,
            skipped_requests=progress.num_skipped,
            window_requests=min(WINDOW_REQUESTS, progress.window.requests),
            rates=progress.window.rates(capacities),
            empty_rates=empty_rates,
            cold_rates=None if cold is None else cold.rates(capacities),
            whole_hit_rate=progress.totals.hit_blocks / max(1, progress.totals.blocks),
        )

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Give the figures as text, each with its name."""
        window = f"{self.window_requests:,} requests"
        rows = [
            ("restored blocks", f"{self.restored_blocks:,}"),
            ("tiers opened and restored in", f"{self.seconds:.3f} s"),
            *([("requests done before, skipped", f"{self.skipped_requests:,}")] if self.skipped_requests else []),
            (f"found in disk, first {window} after the start", f"{self.rates.get(DISK, 0.0):.4f}"),
            ("the same, had all tiers been empty", f"{self.empty_rates.get(DISK, 0.0):.4f}"),
        ]
        if self.cold_rates is not None:
            rows.append(("the same, cold start of the trace", f"{self.cold_rates.get(DISK, 0.0):.4f}"))
        if self.skipped_requests:
            rows.append(("hit rate, runs before included", f"{self.whole_hit_rate:.4f}"))
        return rows
