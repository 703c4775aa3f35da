"""The index file of a slab: two copies of a header, one record a slot, little-endian; see docs/design/disk-format.md.

Nothing here reads or writes a file. A header is believed when its magic, version and CRC hold, a record when its CRC
does; CRCs are those of `zlib.crc32`, computed here over all records at once.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvbm.errors import SlabFormatError
from kvbm.types import HashArray

MAGIC = b"KVBMSLAB"
VERSION = 1
HEADER_NBYTES = 4096
NUM_HEADERS = 2  # one can be torn while the other holds
RECORDS_AT = NUM_HEADERS * HEADER_NBYTES
RECORD_NBYTES = 64
MAX_FINGERPRINT_NBYTES = 2048

FREE, LIVE = 0, 1  # states of a record

RECORD_DTYPE = np.dtype(
    [
        ("hash", "<u8", 2),
        ("parent", "<u8", 2),
        ("checksum", "<u8"),
        ("length", "<u4"),  # bytes of the block
        ("generation", "<u4"),  # the slab's when it was written; one of another generation counts as free
        ("written_at", "<u4"),  # seconds since 1970
        ("used_at", "<u4"),
        ("order", "<u2"),  # among records used in the same second, the older first
        ("priority", "u1"),
        ("state", "u1"),
        ("crc", "<u4"),  # of the 60 bytes before it
    ]
)
assert RECORD_DTYPE.itemsize == RECORD_NBYTES

# Magic, version, bytes of a record; slots, bytes of a block and of a slot, nanoseconds since 1970 when it was made,
# sequence number, generation, bytes of the fingerprint that follows.
_HEADER = struct.Struct("<8sIIQQQQQII")
_CRC_AT = HEADER_NBYTES - 4

RecordArray = npt.NDArray[np.void]


class SlabVersionError(SlabFormatError):
    """A slab was written by another version of this package."""


@dataclass(frozen=True)
class Header:
    """What a slab is.

    Attributes
    ----------
    num_slots : int
    block_nbytes, slot_nbytes : int
        Of one block, and of the slot it lies in.
    made_at : int
        Nanoseconds since 1970.
    sequence : int
        One more each time the header is written: the higher of two copies counts.
    generation : int
        One more each time the whole slab is forgotten; records of another generation count as free.
    fingerprint : str
        Names what the blocks are of: model, layout, rank.
    """

    num_slots: int
    block_nbytes: int
    slot_nbytes: int
    made_at: int
    sequence: int
    generation: int
    fingerprint: str


def encode_header(header: Header) -> bytes:
    """Turn a header into `HEADER_NBYTES` bytes.

    Raises
    ------
    SlabFormatError
        The fingerprint is too long.
    """
    name = header.fingerprint.encode()
    if len(name) > MAX_FINGERPRINT_NBYTES:
        raise SlabFormatError(f"a fingerprint of {len(name)} bytes is too long, give at most {MAX_FINGERPRINT_NBYTES}")
    fixed = _HEADER.pack(
        MAGIC, VERSION, RECORD_NBYTES, header.num_slots, header.block_nbytes, header.slot_nbytes, header.made_at,
        header.sequence, header.generation, len(name),
    )  # fmt: skip
    body = (fixed + name).ljust(_CRC_AT, b"\0")
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_header(data: bytes) -> Header:
    """Read one copy of a header.

    Raises
    ------
    SlabVersionError
        It is whole, and of another version.
    SlabFormatError
        These bytes are no header, or a damaged one.
    """
    if len(data) != HEADER_NBYTES:
        raise SlabFormatError(f"a slab's header has {HEADER_NBYTES} bytes, got {len(data)}")
    magic, version, record_nbytes, slots, block, slot, made_at, sequence, generation, length = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise SlabFormatError("this is no slab: its first bytes are not KVBMSLAB")
    if int.from_bytes(data[_CRC_AT:], "little") != zlib.crc32(data[:_CRC_AT]):
        raise SlabFormatError("the slab's header is damaged: its CRC does not hold")
    if version != VERSION or record_nbytes != RECORD_NBYTES:
        raise SlabVersionError(
            f"the slab is of version {version} with records of {record_nbytes} bytes, this package reads version "
            f"{VERSION}: use the package that wrote it, or on_mismatch='replace'"
        )
    if length > MAX_FINGERPRINT_NBYTES or not 0 < block <= slot or not 0 < slots < 2**31:
        raise SlabFormatError("the slab's header is damaged: its sizes are impossible")
    try:
        fingerprint = data[_HEADER.size : _HEADER.size + length].decode()
    except UnicodeDecodeError as error:
        raise SlabFormatError("the slab's header is damaged: its fingerprint is no text") from error
    return Header(slots, block, slot, made_at, sequence, generation, fingerprint)


def choose_header(copies: Sequence[bytes]) -> Header:
    """Give the header that counts among the copies of a file.

    Raises
    ------
    SlabVersionError
        A whole copy is of another version.
    SlabFormatError
        No copy is whole.
    """
    found: list[Header] = []
    reasons: list[SlabFormatError] = []
    for data in copies:
        try:
            found.append(decode_header(data))
        except SlabVersionError:
            raise
        except SlabFormatError as error:
            reasons.append(error)
    if not found:
        raise reasons[0] if reasons else SlabFormatError("this is no slab: it is empty")
    return max(found, key=lambda header: header.sequence)


def seal(records: RecordArray) -> RecordArray:
    """Fill in the CRC of each record, in place; (num_records,) of `RECORD_DTYPE`."""
    records["crc"] = crc_of(records)
    return records


def is_live(records: RecordArray, header: Header) -> npt.NDArray[np.bool_]:
    """Tell which records name a block that counts: (num_records,) bool."""
    is_sane = (records["length"] == header.block_nbytes) & (records["priority"] <= 100)
    is_ours = (records["state"] == LIVE) & (records["generation"] == header.generation)
    return is_ours & is_sane & (records["crc"] == crc_of(records))  # type: ignore[no-any-return]


def is_last_of_its_name(hashes: HashArray) -> npt.NDArray[np.bool_]:
    """Tell which of equal hashes stands last: (num_blocks,) bool."""
    is_last = np.ones(len(hashes), dtype=np.bool_)
    first_words = np.sort(hashes[:, 0])
    if not (first_words[1:] == first_words[:-1]).any():  # as a rule; two sorts are saved
        return is_last
    by_name = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the last of equal names stays last
    names = hashes[by_name]
    is_repeated = (names[1:] == names[:-1]).all(axis=1)
    is_last[by_name[:-1][is_repeated]] = False
    return is_last


def crc_of(records: RecordArray) -> npt.NDArray[np.uint32]:
    """Compute `zlib.crc32` of each record without its last 4 bytes: (num_records,) uint32."""
    if len(records) <= _FEW:  # the start of the other way costs more
        return np.array([zlib.crc32(row[:-4]) for row in _rows_of(records)], dtype=np.uint32)
    crc = np.empty(len(records), dtype=np.uint32)
    data = np.ascontiguousarray(records).view(np.uint8).reshape(-1, RECORD_NBYTES)
    for first in range(0, len(records), _ROWS_AT_ONCE):  # what is at hand stays in the cache
        part = data[first : first + _ROWS_AT_ONCE].T.copy()
        value = np.full(part.shape[1], 0xFFFFFFFF, dtype=np.uint32)
        for column in part[:-4]:
            value = _TABLE.take((value ^ column) & 0xFF) ^ (value >> np.uint32(8))
        crc[first : first + _ROWS_AT_ONCE] = ~value
    return crc


def _rows_of(records: RecordArray) -> list[bytes]:
    data = np.ascontiguousarray(records).tobytes()
    return [data[first : first + RECORD_NBYTES] for first in range(0, len(data), RECORD_NBYTES)]


def _make_table() -> npt.NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1).astype(np.uint32)
    return table


_TABLE = _make_table()
_ROWS_AT_ONCE = 1 << 14
_FEW = 256
