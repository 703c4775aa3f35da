"""BLAKE2b and chains of sequence hashes with the standard library: the readable twin of ``kvbm._native.hashing``."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.errors import wrong_hash_input, wrong_token_batch
from kvbm.types import HASH_NBYTES, HashArray


def blake2b(data: bytes, *, digest_size: int, key: bytes = b"", person: bytes = b"") -> bytes:
    """Hash bytes with BLAKE2b (RFC 7693).

    Parameters
    ----------
    data : bytes
    digest_size : int
        Bytes of the result, 1 to 64.
    key, person : bytes, optional
        Up to 64 and 16 bytes.

    Raises
    ------
    HashFormatError
        An argument is no bytes object, or a size is out of range.
    """
    for name, value, limit in (("data", data, None), ("key", key, 64), ("person", person, 16)):
        if not isinstance(value, bytes):
            raise wrong_hash_input(name, "bytes", type(value).__name__)
        if limit is not None and len(value) > limit:
            raise wrong_hash_input(name, f"0 to {limit} bytes", f"{len(value)}")
    if not 1 <= operator.index(digest_size) <= 64:
        raise wrong_hash_input("digest_size", "1 to 64 bytes", f"{digest_size}")
    return hashlib.blake2b(data, digest_size=digest_size, key=key, person=person).digest()


def hash_blocks(
    key: bytes,
    parent: bytes,
    tokens: npt.NDArray[np.uint32],
    block_size: int,
    extras: Sequence[bytes] | None = None,
) -> HashArray:
    """Hash a run of full blocks, each with the hash of the one before.

    Parameters
    ----------
    key : bytes
        Root of the chain, 1 to 64 bytes.
    parent : bytes
        Hash of the block before the first: 16 bytes, zeros where there is none.
    tokens : (num_blocks * block_size,) uint32, C-contiguous, host
    block_size : int
        Tokens per block.
    extras : sequence of bytes, optional
        One for each block; empty where a block has none.

    Returns
    -------
    (num_blocks, 2) uint64, host
        BLAKE2b-128(key, parent || tokens as u32 little-endian || extra).

    Raises
    ------
    TokenError
        An argument is not as above.

    Notes
    -----
    The native twin lets other Python threads run during batches of more than 1,024 blocks.
    """
    if extras is not None:
        extras = tuple(extras)
    num_blocks = _count_blocks(key, parent, tokens, block_size, extras)
    if num_blocks == 0:
        return np.empty((0, 2), dtype=np.uint64)
    data = memoryview(tokens.astype("<u4", copy=False).tobytes())
    block_nbytes = 4 * block_size
    chain = []
    keyed = hashlib.blake2b(digest_size=HASH_NBYTES, key=key)
    for i in range(num_blocks):
        block = keyed.copy()
        block.update(parent)
        block.update(data[i * block_nbytes : (i + 1) * block_nbytes])
        if extras is not None:
            block.update(extras[i])
        parent = block.digest()
        chain.append(parent)
    hashes: HashArray = np.frombuffer(b"".join(chain), dtype="<u8").reshape(-1, 2).copy()
    return hashes


def _count_blocks(key: Any, parent: Any, tokens: Any, block_size: int, extras: Sequence[Any] | None) -> int:
    """Check the arguments and count the blocks; the native twin has the same function."""
    if not isinstance(tokens, np.ndarray):
        raise wrong_token_batch(f"tokens in a {type(tokens).__name__}")
    if tokens.dtype != np.uint32 or tokens.ndim != 1 or not tokens.flags.c_contiguous:
        raise wrong_token_batch(f"tokens of shape {tokens.shape} and dtype {tokens.dtype}")
    if operator.index(block_size) < 1 or len(tokens) % block_size:
        raise wrong_token_batch(f"{len(tokens)} tokens in blocks of {block_size}")
    if not isinstance(key, bytes) or not isinstance(parent, bytes):
        raise wrong_token_batch(f"a key in a {type(key).__name__} and a parent in a {type(parent).__name__}")
    if len(parent) != HASH_NBYTES or not 1 <= len(key) <= 64:
        raise wrong_token_batch(f"a key of {len(key)} and a parent of {len(parent)} bytes")
    num_blocks = len(tokens) // block_size
    if extras is not None:
        if len(extras) != num_blocks:
            raise wrong_token_batch(f"{len(extras)} extras for {num_blocks} blocks")
        for extra in extras:
            if not isinstance(extra, bytes):
                raise wrong_token_batch(f"an extra in a {type(extra).__name__}")
    return num_blocks
