"""Only blocks that are used more often than what they would displace go down: W-TinyLFU, as an offload policy.

TinyLFU (Einziger, Friedman, Manes: "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on Storage
13(4), 2017) admits a newcomer to a cache when it was lately used more often than the cache's next victim; W-TinyLFU
puts a small window in front, in which newcomers prove themselves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.planner.policies.base import Candidates, OffloadPolicy
from kvbm.planner.policies.names import NameTable
from kvbm.planner.policies.sketch import MAX_ITEMS, FrequencySketch, mix_words

MAX_REMEMBERED = 1 << 18  # names; of a larger tier they are a random sample

_USES_PER_BLOCK = 3  # between two halvings


class TinyLfuPolicy(OffloadPolicy):
    """Offloads a block that beats, by its uses of late, the block that it would displace below.

    Parameters
    ----------
    num_blocks : int
        Blocks of the tier below.
    window_share : float
        Size of the window, as a share of `num_blocks`.
    min_uses : int
        What a block needs even where the tier below has room, 1 to 16.
    sample_size : int, optional
        Uses after which all counts are halved; default three for each block below.
    seed : int, optional
        Of the sketch; default: random.

    Raises
    ------
    ConfigError
        A number is outside its limits.

    Notes
    -----
    A policy sees names, not the tier below. So this is what it does instead of the paper's three parts:

    - *Frequency*: every block registered above or found by a request is counted in a `FrequencySketch`, which halves
      its counts as it goes.
    - *The victim*: the names that went down are remembered, as many as the tier has blocks, in sets of eight with the
      time of their last use (`NameTable`). A candidate meets the oldest of its set, which stands for the tier's next
      victim; it passes when it was used strictly more often, and takes that place. Where the set has room, so has the
      tier. What is remembered passes: where it still lies below, nothing is copied. Of more than 262,144 names, a
      random share is remembered.
    - *The window*: names seen last, a `NameTable` too. The tier above holds their blocks anyway, so one that is there
      for the first time is not written. Used again while it is in the window, it passes without a comparison: a burst
      must not lose to a long history. Later it has to win.

    What loses is asked about again at its next use. Priorities do not count here: they say how long a block is kept.
    The paper halves after about ten uses for each block; prefixes of conversations go out of use faster.

    Each call is O(batch), and every `sample_size` uses O(num_blocks) more. Memory, all of it allocated at once: up to
    7 bytes a block below for counts, and 24 for each name remembered and in the window; 28 MiB at most.

    Examples
    --------
    >>> policy = TinyLfuPolicy(num_blocks=1000)
    >>> hashes = np.array([[1, 2], [3, 4]], dtype=np.uint64)
    >>> blocks = Candidates("host", "disk", hashes, hashes, np.full(2, 50, dtype=np.uint8))
    >>> policy.registered(blocks).tolist(), policy.used(blocks).tolist()
    ([False, False], [True, True])
    """

    def __init__(
        self,
        num_blocks: int = 65536,
        *,
        window_share: float = 0.01,
        min_uses: int = 2,
        sample_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ConfigError(f"num_blocks is {num_blocks}, give 1 or more")
        if not 0 < window_share <= 1:
            raise ConfigError(f"window_share is {window_share}, give more than 0 and at most 1")
        if not 1 <= min_uses <= 16:
            raise ConfigError(f"min_uses is {min_uses}, give 1..16")
        self._min_uses = min_uses
        sample_size = sample_size or min(num_blocks, MAX_ITEMS) * _USES_PER_BLOCK
        self._sketch = FrequencySketch(num_blocks, sample_size=sample_size, seed=seed)
        self._below = NameTable(min(num_blocks, MAX_REMEMBERED))
        self._share = np.uint64(min(1.0, MAX_REMEMBERED / num_blocks) * 2**32)  # of names, that are remembered
        self._window = NameTable(min(max(1, round(num_blocks * window_share)), MAX_REMEMBERED))

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the same for ever."""
        return self._sketch.nbytes + self._below.nbytes + self._window.nbytes

    def registered(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose those that beat what they would displace; never one that was not seen before."""
        return self._compete(blocks)

    def used(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        """Choose those that beat what they would displace."""
        return self._compete(blocks)

    def _compete(self, blocks: Candidates) -> npt.NDArray[np.bool_]:
        names = self._sketch.mix(blocks.hashes)
        window_places, is_burst = self._window.find(names)
        self._window.put(window_places, names)
        self._sketch.add(names)
        places, is_below = self._below.find(names)
        victims, are_there = self._below.names_at(places)
        uses, rivals = np.split(self._sketch.estimate(np.concatenate([names, victims])), 2)
        beats = uses > rivals * are_there
        passes = is_below | ((beats | is_burst) & (uses >= self._min_uses))
        kept = passes & ((mix_words(names[:, 1]) >> np.uint64(32)) < self._share)
        self._below.put(places[kept], names[kept])
        return np.asarray(passes)
