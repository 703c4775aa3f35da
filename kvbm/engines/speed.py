"""How fast an engine computes prompts, learnt from its own steps; and whether loads keep what they promise.

What a load costs is judged by the clock of whoever waits: from the moment when the engine had room for it until its
blocks were there, the engine's own steps included. A tier whose loads keep taking longer than computing would have is
left alone for a while, then tried again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvbm.types import Tier

_log = logging.getLogger("kvbm.engines")

_FADING = 0.8  # weight of what was known when a step is observed
_FEW_TOKENS = 32  # a step of fewer says what a step costs, not what a token does
_LOADS = 5  # that are judged together
_BAD = 3  # of them
_FIRST_REST_S, _LONGEST_REST_S = 10.0, 600.0


class PrefillSpeed:
    """What the engine's steps show of its speed.

    Attributes
    ----------
    tokens_per_s : float or None
        Of prompts; None until a step has shown it. Until a long one has, at least so much: a short step's own cost is
        in it.
    step_s : float
        That a step takes.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self.step_s = 0.0
        self._is_shown = False  # by a long step

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note a step that computed so many tokens of prompts."""
        if seconds <= 0:
            return
        self.step_s = _fade(self.step_s or None, seconds)
        if num_tokens >= _FEW_TOKENS:
            self.tokens_per_s = _fade(self.tokens_per_s if self._is_shown else None, num_tokens / seconds)
            self._is_shown = True
        elif num_tokens and not self._is_shown:
            self.tokens_per_s = max(self.tokens_per_s or 0.0, num_tokens / seconds)

    def seconds(self, num_tokens: int) -> float | None:
        """Predict how long computing so many tokens takes; None while nothing is known."""
        return None if self.tokens_per_s is None else num_tokens / self.tokens_per_s


def _fade(known: float | None, new: float) -> float:
    return new if known is None else _FADING * known + (1 - _FADING) * new


@dataclass
class _Record:
    """What loads from one tier did lately."""

    were_slow: deque[bool] = field(default_factory=lambda: deque(maxlen=_LOADS))
    rests_until: float = 0.0
    rest_s: float = _FIRST_REST_S


class TierGuard:
    """Keeps an engine from loading where computing is sooner, whatever the estimates say.

    Parameters
    ----------
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[Tier, _Record] = {}

    def is_open(self, tier: Tier) -> bool:
        """Whether blocks of this tier are to be loaded now."""
        record = self._records.get(tier)
        return record is None or self._clock() >= record.rests_until

    def observe(self, tier: Tier, seconds: float, computing_s: float) -> None:
        """Note a load: its lowest tier, how long it took, and how long computing its tokens would have.

        Parameters
        ----------
        tier : Tier
        seconds, computing_s : float
        """
        record = self._records.setdefault(tier, _Record())
        record.were_slow.append(seconds > computing_s)
        if not record.were_slow[-1]:
            record.rest_s = _FIRST_REST_S
        if sum(record.were_slow) < _BAD:
            return
        is_first = record.rest_s == _FIRST_REST_S
        _log.log(
            logging.WARNING if is_first else logging.INFO,
            "tier is left alone tier=%s seconds=%g: its loads take longer than computing (%.3g s for %.3g s)",
            tier.value, record.rest_s, seconds, computing_s,
        )  # fmt: skip
        record.rests_until = self._clock() + record.rest_s
        record.rest_s = min(2 * record.rest_s, _LONGEST_REST_S)
        record.were_slow.clear()
