"""FrequencySketch: about how often each of many hashes was used lately, in a few bytes a hash.

A count-min sketch with a doorkeeper, aged by halving, as TinyLFU has it (Einziger, Friedman, Manes: "TinyLFU: A Highly
Efficient Cache Admission Policy", ACM Transactions on Storage 13(4), 2017). It never locks; its memory never grows.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

from kvbm.errors import ConfigError
from kvbm.types import HashArray

NUM_ROWS = 4
MAX_COUNT = 15  # of a counter of four bits
MAX_ITEMS = 1 << 22  # beyond this many hashes the counts are of a shorter past, not of more memory

_USES_PER_ITEM = 10  # between two halvings, the paper's W/C
_DOOR_BITS_PER_USE = 4  # wrong about one new hash in seven just before a halving, one in thirty half-way

_MIN_WIDTH = 1024

_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


class FrequencySketch:
    """Estimates how often hashes were used.

    Parameters
    ----------
    num_items : int
        Hashes that are worth telling apart: the blocks of the cache below.
    sample_size : int, optional
        Uses after which every count is halved; default ten for each item.
    seed : int, optional
        Default: random, so that nobody can prepare hashes that share their counters.

    Raises
    ------
    ConfigError
        A number is below 1.

    Notes
    -----
    Each call is O(batch), plus a halving, O(num_items), every `sample_size` uses. Memory is 2 to 4 bytes an item for
    the counters, of which there are no more than for 4,194,304, and half a byte to one for each use of the sample.

    *Independent rows.* A hash is mixed, with the seed, into two words of 64 bits, each bit of which depends on all 128
    of the hash. The four rows take the four halves of those two words. So no bit of the hash's mix is in the index of
    two rows, and hashes that share a counter in one row share one in another as often as any two do. The doorkeeper's
    two bits come from a third word.

    *Batches.* What a batch says happened at one moment: a hash that is in it twice is counted once.

    Examples
    --------
    >>> sketch = FrequencySketch(1000)
    >>> names = sketch.mix(np.array([[1, 2], [3, 4]], dtype=np.uint64))
    >>> sketch.add(names)
    >>> sketch.add(names[:1])
    >>> sketch.estimate(names).tolist()
    [2, 1]
    """

    def __init__(self, num_items: int, *, sample_size: int | None = None, seed: int | None = None) -> None:
        if num_items < 1:
            raise ConfigError(f"num_items is {num_items}, give 1 or more")
        if sample_size is not None and sample_size < 1:
            raise ConfigError(f"sample_size is {sample_size}, give 1 or more")
        num_items = min(num_items, MAX_ITEMS)
        self.sample_size = sample_size or num_items * _USES_PER_ITEM
        self.num_halvings = 0
        self._num_uses = 0  # since the last halving, and half of those before
        self._seed = np.uint64((secrets.randbits(64) if seed is None else seed) & (2**64 - 1))
        self._width = max(_MIN_WIDTH, _power_of_two(num_items))  # counters of a row
        self._counters = np.zeros(NUM_ROWS * self._width // 2, dtype=np.uint8)  # two in a byte, row after row
        num_bits = max(_MIN_WIDTH, _power_of_two(self.sample_size * _DOOR_BITS_PER_USE))
        self._door = np.zeros(num_bits // 8, dtype=np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, the same for ever."""
        return self._counters.nbytes + self._door.nbytes

    def mix(self, hashes: HashArray) -> Words:
        """Mix hashes into names, which the other calls take: (n, 2) uint64, a permutation of the 128 bits."""
        first, second = hashes[:, 0], hashes[:, 1]
        low = mix_words(second ^ mix_words(first ^ self._seed))
        return np.stack([mix_words(first + low), low], axis=1)

    def add(self, names: Words) -> None:
        """Count a use of each name: (n, 2) uint64."""
        bytes_, bits = self._doors(names)
        known = ((self._door[bytes_] & bits) != 0).all(axis=0)
        np.bitwise_or.at(self._door, bytes_, bits)
        if known.any():
            self._grow(self._places(names[known]))
        self._num_uses += len(names)
        while self._num_uses >= self.sample_size:
            self._halve()

    def estimate(self, names: Words) -> npt.NDArray[np.uint8]:
        """Estimate the uses of names, (n,) uint8 up to 16: never too few since the last halving, seldom too many."""
        bytes_, bits = self._doors(names)
        known = ((self._door[bytes_] & bits) != 0).all(axis=0)
        return np.asarray(self._read(self._places(names)).min(axis=0) + known, dtype=np.uint8)

    # -- private -----------------------------------------------------------------------------------------------

    def _places(self, names: Words) -> Places:
        """Give the counter of each name in each row: (rows, n), a half word each."""
        halves = np.stack([names[:, 0] & _LOW, names[:, 0] >> _HALF, names[:, 1] & _LOW, names[:, 1] >> _HALF])
        starts = np.arange(NUM_ROWS, dtype=np.int64)[:, None] * self._width
        return halves.astype(np.int64) % self._width + starts

    def _doors(self, names: Words) -> tuple[Places, npt.NDArray[np.uint8]]:
        """Give the two bits of each name in the doorkeeper: (2, n) bytes and masks."""
        word = mix_words(names[:, 0] + names[:, 1])
        places = np.stack([word & _LOW, word >> _HALF]).astype(np.int64) % (8 * len(self._door))
        return places >> 3, np.left_shift(1, places & 7).astype(np.uint8)

    def _read(self, places: Places) -> npt.NDArray[np.uint8]:
        shifts = (places & 1).astype(np.uint8) << 2
        return np.asarray((self._counters[places >> 1] >> shifts) & 15, dtype=np.uint8)

    def _grow(self, places: Places) -> None:
        """Add one to the smallest counters of each name; those above are too high already (minimal increment)."""
        counts = self._read(places)
        smallest = counts.min(axis=0)
        grows = (counts == smallest) & (smallest < MAX_COUNT)
        # Whoever shares a counter writes the same number; whoever shares only its byte is written in the other turn.
        for turn, others in ((0, 0xF0), (1, 0x0F)):
            chosen = grows & ((places & 1) == turn)
            bytes_ = places[chosen] >> 1
            self._counters[bytes_] = (self._counters[bytes_] & others) | ((counts[chosen] + 1) << (4 * turn))

    def _halve(self) -> None:
        """Forget half of every count, so that what was popular once makes room."""
        self._counters = (self._counters >> 1) & np.uint8(0x77)
        self._door[:] = 0
        self._num_uses //= 2
        self.num_halvings += 1


def mix_words(words: Words) -> Words:
    """Mix each word so that every bit of it reaches every bit of the result (the finaliser of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)))


def _power_of_two(number: int) -> int:
    """Give the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
