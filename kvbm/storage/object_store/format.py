"""What lies under a key: 64 bytes of header, then the block's bytes in logical order. All integers little-endian.

    offset  bytes  what
         0      8  magic, ``KVBMOBJ`` and a zero byte
         8      4  version, 1
        12      4  flags: bit 0, the checksum is kept
        16      8  length of the block in bytes
        24     16  sequence hash
        40      8  checksum of the block (`kvbm.storage.base.Storage.checksums`), 0 where it is not kept
        48     12  zero
        60      4  CRC-32 (zlib) of the 60 bytes before

A header is believed only where every field is right; there is no other order of writes to rely on. The key is
``prefix / digest / hash``, both in hex: workers find each other's blocks where model and layout are the same.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from kvbm.errors import ConfigError, KvbmError
from kvbm.layout import BlockLayout
from kvbm.types import HASH_NBYTES

HEADER_NBYTES = 64
MAGIC = b"KVBMOBJ\0"
VERSION = 1

_HAS_CHECKSUM = 1
_FIELDS = struct.Struct("<8sIIQ16sQ12s")
_CRC = struct.Struct("<I")
_ZEROS = bytes(12)
_HASH_HEX = re.compile(rf"[0-9a-f]{{{2 * HASH_NBYTES}}}")


class GarbageError(KvbmError, ValueError):
    """What lies under a key is not the block that belongs there."""


class ForeignError(GarbageError):
    """It is an object of another release, which may read it."""


@dataclass(frozen=True)
class ObjectHeader:
    """What an object says of the block that follows.

    Attributes
    ----------
    sequence_hash : bytes
        16 bytes.
    nbytes : int
        Length of the block.
    checksum : int or None
        None where it is not kept.
    """

    sequence_hash: bytes
    nbytes: int
    checksum: int | None

    def encode(self) -> bytes:
        """Give the 64 bytes."""
        has_checksum = self.checksum is not None
        flags = _HAS_CHECKSUM if has_checksum else 0
        fields = _FIELDS.pack(MAGIC, VERSION, flags, self.nbytes, self.sequence_hash, self.checksum or 0, _ZEROS)
        return fields + _CRC.pack(zlib.crc32(fields))

    @classmethod
    def decode(cls, data: Any) -> ObjectHeader:
        """Read a header.

        Parameters
        ----------
        data : buffer
            The first 64 bytes of an object, or all of it.

        Raises
        ------
        GarbageError
            They are not a header of ours.
        """
        head = bytes(memoryview(data)[:HEADER_NBYTES])
        if len(head) < HEADER_NBYTES:
            raise GarbageError(f"it has {len(head)} bytes, less than a header of {HEADER_NBYTES}")
        magic, version, flags, nbytes, sequence_hash, checksum, zeros = _FIELDS.unpack_from(head)
        if magic != MAGIC:
            raise GarbageError("it does not begin as an object of ours")
        if _CRC.unpack_from(head, _FIELDS.size)[0] != zlib.crc32(head[: _FIELDS.size]):
            raise GarbageError("its header does not match the header's CRC")
        if version != VERSION:
            raise ForeignError(f"it has version {version}, this release reads version {VERSION}")
        has_checksum = flags == _HAS_CHECKSUM
        if flags & ~_HAS_CHECKSUM or zeros != _ZEROS or (checksum and not has_checksum):
            raise GarbageError("its header has a value where version 1 has none")
        return cls(sequence_hash, nbytes, checksum if has_checksum else None)


def check_header(data: Any, sequence_hash: bytes, nbytes: int) -> int | None:
    """Give the checksum of a block, None where none is kept.

    Raises
    ------
    GarbageError
        The header is damaged, or tells of another block.
    """
    header = ObjectHeader.decode(data)
    if header.sequence_hash != sequence_hash:
        raise GarbageError(f"it tells of block {header.sequence_hash.hex()}")
    if header.nbytes != nbytes:
        raise GarbageError(f"it tells of {header.nbytes} bytes, a block has {nbytes}")
    return header.checksum


def digest_of(fingerprint: str, layout: BlockLayout) -> str:
    """Give the part of a key that keeps models and layouts apart: 32 hexadecimal digits.

    Parameters
    ----------
    fingerprint : str
        What the bytes depend on beside the tokens; not empty.
    layout : BlockLayout
        Its element type, dimensions and order count, the number of blocks and gaps do not.

    Raises
    ------
    ConfigError
        No fingerprint.
    """
    if not fingerprint:
        raise ConfigError(
            "an object store needs a fingerprint of the model, got none: blocks of another model must not be found"
        )
    shape = (
        layout.num_layers,
        layout.outer_dim,
        layout.block_size,
        layout.inner_dim,
        layout.num_heads,
        layout.dtype,
        *layout.region_order,
    )
    digest = hashlib.blake2b(digest_size=16, person=b"kvbm-objects-v1")
    for part in (fingerprint, *map(str, shape)):
        encoded = part.encode()
        digest.update(struct.pack("<I", len(encoded)) + encoded)
    return digest.hexdigest()


def hash_in(path: str) -> bytes | None:
    """Give the sequence hash that a listed path ends with; None for a stranger's object."""
    name = path.rpartition("/")[2]
    return bytes.fromhex(name) if _HASH_HEX.fullmatch(name) else None
