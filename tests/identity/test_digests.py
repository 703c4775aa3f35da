"""Digests of an engine become sequence hashes: cut to 16 bytes, weak ones only when allowed."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kvbm.errors import HashFormatError
from kvbm.sequence import hashes_from_digests


def test_long_digests_are_cut_to_16_bytes() -> None:
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(3)]
    hashes = hashes_from_digests(digests)
    assert (hashes.shape, hashes.dtype, hashes.flags.writeable) == ((3, 2), np.uint64, True)
    assert [row.tobytes() for row in hashes] == [digest[:16] for digest in digests]
    assert hashes_from_digests([bytearray(digests[0][:16])]).tobytes() == digests[0][:16]
    assert hashes_from_digests([]).shape == (0, 2)


def test_short_digests_need_permission() -> None:
    with pytest.raises(HashFormatError, match="digest 1 has 15 bytes, need 16: use a longer hash in the engine"):
        hashes_from_digests([bytes(16), bytes(15)])
    assert hashes_from_digests([b"8 bytes!"], allow_weak_hashes=True).tobytes() == b"8 bytes!" + bytes(8)


@pytest.mark.parametrize("digest", [b"", "text", 12345, None])
def test_what_is_no_digest_is_refused_always(digest) -> None:
    with pytest.raises(HashFormatError, match="digest 0 must be 1 or more bytes"):
        hashes_from_digests([digest], allow_weak_hashes=True)
