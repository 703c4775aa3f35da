"""Which calls of a storage go wrong, and how: from a list, then at random; counted.

The same seed and the same calls give the same faults. One lock guards the plan.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError


class FaultMode(str, enum.Enum):
    """What goes wrong with a call.

    FAIL says no for some blocks and leaves poison in their place. DELAY holds the whole call, bytes and all, at a gate.
    TEAR moves only the first bytes of some blocks, FLIP turns one bit of each; both claim success. NEVER does not
    answer until it is abandoned.
    """

    FAIL = "fail"
    DELAY = "delay"
    TEAR = "tear"
    FLIP = "flip"
    NEVER = "never"


@dataclass(frozen=True)
class Injection:
    """What a plan chose for one call.

    Attributes
    ----------
    mode : FaultMode
    places : (num_affected,) int64
        Which blocks of the batch it befalls, sorted; all of them for DELAY and NEVER.
    seed : int
        From which the details, such as the bit, are drawn.
    """

    mode: FaultMode
    places: npt.NDArray[np.int64]
    seed: int


class FaultPlan:
    """Chooses what goes wrong with each call: from a list first, then at random.

    Parameters
    ----------
    modes : iterable of FaultMode or None
        For the first calls, in order; None lets a call pass.
    rates : mapping of FaultMode to float, optional
        Probabilities for the calls after those; the rest passes.
    seed : int
        The same seed and the same calls give the same faults.
    affects : str
        Blocks of a batch that a fault befalls: "one", "some" (at least one), or "all".
    on : str
        Calls that count: "read", "write", or "both"; others always pass.

    Attributes
    ----------
    is_on : bool
        Set it to False to let everything pass from then on.
    num_calls : int
        Calls that counted, with at least one block.
    num_injected : dict of FaultMode to int
    num_blocks_injected : dict of FaultMode to int

    Examples
    --------
    >>> plan = FaultPlan([None, FaultMode.FAIL])
    >>> plan.choose(4, is_read=True) is None
    True
    >>> plan.choose(4, is_read=True).mode.value, plan.num_injected[FaultMode.FAIL]
    ('fail', 1)
    """

    def __init__(
        self,
        modes: Iterable[FaultMode | None] = (),
        *,
        rates: Mapping[FaultMode, float] | None = None,
        seed: int = 0,
        affects: str = "one",
        on: str = "both",
    ) -> None:
        if affects not in ("one", "some", "all") or on not in ("read", "write", "both"):
            raise ConfigError(f"affects is one, some or all, on is read, write or both, got {affects!r} and {on!r}")
        self._rates = {FaultMode(mode): float(rate) for mode, rate in (rates or {}).items()}
        if any(rate < 0 for rate in self._rates.values()) or sum(self._rates.values()) > 1:
            raise ConfigError(f"rates must be 0 or more and add up to at most 1, got {self._rates}")
        self.is_on = True
        self.num_calls = 0
        self.num_injected = dict.fromkeys(FaultMode, 0)
        self.num_blocks_injected = dict.fromkeys(FaultMode, 0)
        self._modes = iter(modes)
        self._affects = affects
        self._on = on
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def choose(self, num_blocks: int, *, is_read: bool) -> Injection | None:
        """Choose for one call of `num_blocks` blocks; None lets it pass."""
        if not self.is_on or not num_blocks or self._on == ("write" if is_read else "read"):
            return None
        with self._lock:
            self.num_calls += 1
            try:
                chosen = next(self._modes)
            except StopIteration:
                chosen = self._draw()
            if chosen is None:
                return None
            mode = FaultMode(chosen)
            places = self._places(num_blocks, mode)
            self.num_injected[mode] += 1
            self.num_blocks_injected[mode] += len(places)
            return Injection(mode, places, int(self._rng.integers(2**32)))

    def _draw(self) -> FaultMode | None:
        point = self._rng.random()
        for mode, rate in self._rates.items():
            if point < rate:
                return mode
            point -= rate
        return None

    def _places(self, num_blocks: int, mode: FaultMode) -> npt.NDArray[np.int64]:
        if self._affects == "all" or mode in (FaultMode.DELAY, FaultMode.NEVER):
            return np.arange(num_blocks, dtype=np.int64)
        num_affected = 1 if self._affects == "one" else int(self._rng.integers(1, num_blocks + 1))
        return np.sort(self._rng.permutation(num_blocks)[:num_affected]).astype(np.int64)
