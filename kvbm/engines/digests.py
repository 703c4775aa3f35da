"""An engine's block digests as our sequence hashes: their last 16 bytes, converted once each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvbm.errors import HashFormatError
from kvbm.types import HASH_NBYTES, HashArray


class Digests:
    """The hashes of one request's full blocks, growing as the engine names them.

    Parameters
    ----------
    allow_weak : bool
        Take digests of fewer than 16 bytes, zero-padded: two prompts may then be taken for one.
    variant : int
        64 bits that tell apart what the engine's digests do not, such as an adapter that was trained anew under its old
        name. They go into the first eight bytes: engines name blocks in events by the last eight.
    """

    def __init__(self, *, allow_weak: bool = False, variant: int = 0) -> None:
        self._allow_weak = allow_weak
        self._variant = np.uint64(variant)
        self._names: HashArray = np.zeros((16, 2), dtype=np.uint64)
        self._num_names = 0
        self._last = b""  # digest of the last of them

    def __len__(self) -> int:
        return self._num_names

    def extend(self, digests: Sequence[bytes]) -> HashArray:
        """Take over what is new and give all hashes.

        Parameters
        ----------
        digests : sequence of bytes
            Of all full blocks so far, in order; what was given before is not looked at again.

        Returns
        -------
        (num_blocks, 2) uint64, read-only

        Raises
        ------
        HashFormatError
            A digest is too short, or there are fewer than before.
        """
        num_known, num_all = self._num_names, len(digests)
        if num_all < num_known:
            raise HashFormatError(f"the engine named {num_all} blocks of a request that had {num_known}")
        if num_all > num_known:
            new = digests[num_known:] if num_known else digests
            data = b"".join([digest[-HASH_NBYTES:] for digest in new])
            if len(data) != HASH_NBYTES * len(new):
                data = b"".join([self._whole(digest) for digest in new])
            if num_all > len(self._names):
                grown = np.zeros((max(num_all, 2 * len(self._names)), 2), dtype=np.uint64)
                grown[:num_known] = self._names[:num_known]
                self._names = grown
            self._names[num_known:num_all] = np.frombuffer(data, dtype="<u8").reshape(-1, 2)
            self._names[num_known:num_all, 0] ^= self._variant
            self._num_names, self._last = num_all, digests[-1]
        return self.names

    def keep(self, digests: Sequence[bytes]) -> int:
        """Forget the hashes that an engine has taken back, and those behind them; return how many are left.

        Parameters
        ----------
        digests : sequence of bytes
            As for `extend`. A session that goes on without the last token of its text names that token's block anew.
        """
        num_known = self._num_names
        if not num_known or (len(digests) >= num_known and digests[num_known - 1] == self._last):
            return num_known  # each digest is of all tokens up to its end
        again = Digests(allow_weak=self._allow_weak, variant=int(self._variant)).extend(digests[:num_known])
        is_same = (again == self._names[: len(again)]).all(axis=1)
        num_kept = len(again) if is_same.all() else int(is_same.argmin())
        self._names, self._num_names = self._names[:num_kept].copy(), num_kept  # others look at the old ones
        self._last = digests[num_kept - 1] if num_kept else b""
        return num_kept

    @property
    def names(self) -> HashArray:
        """All hashes so far: (num_blocks, 2) uint64, read-only."""
        names = self._names[: self._num_names]
        names.flags.writeable = False
        return names

    def _whole(self, digest: bytes) -> bytes:
        if len(digest) < HASH_NBYTES and not self._allow_weak:
            raise HashFormatError(
                f"a block digest has {len(digest)} bytes, need {HASH_NBYTES} or more: choose a cryptographic hash in "
                "the engine (vLLM: prefix_caching_hash_algo sha256), or set allow_weak_hashes"
            )
        return digest[-HASH_NBYTES:].rjust(HASH_NBYTES, b"\0")
