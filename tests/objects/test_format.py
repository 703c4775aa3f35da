"""The header of an object: golden bytes, and that nothing else is taken for one."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.storage.object_store import GarbageError, ObjectHeader
from kvbm.storage.object_store.format import HEADER_NBYTES, check_header, hash_in

NAME = bytes(range(0, 256, 16))
HEADER = ObjectHeader(NAME, 4096, 0x1122334455667788)


def with_crc(fields: bytes) -> bytes:
    return fields + struct.pack("<I", zlib.crc32(fields))


def test_a_header_has_these_bytes() -> None:
    fields = b"KVBMOBJ\0" + bytes([1, 0, 0, 0, 1, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0]) + NAME
    fields += bytes([0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]) + bytes(12)
    assert HEADER.encode() == with_crc(fields)
    assert len(HEADER.encode()) == HEADER_NBYTES


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**64 - 1), st.none() | st.integers(0, 2**64 - 1))
def test_a_header_comes_back_as_written(name: bytes, nbytes: int, checksum: int | None) -> None:
    header = ObjectHeader(name, nbytes, checksum)
    data = header.encode()
    assert ObjectHeader.decode(data) == header
    assert ObjectHeader.decode(np.frombuffer(data + b"more", dtype=np.uint8)) == header
    assert check_header(data, name, nbytes) == checksum


@given(st.binary(max_size=200))
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(GarbageError):
        ObjectHeader.decode(data)


@given(st.integers(0, HEADER_NBYTES * 8 - 1))
def test_a_flipped_bit_anywhere_is_seen(bit: int) -> None:
    data = bytearray(HEADER.encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(GarbageError):
        ObjectHeader.decode(bytes(data))


@given(st.binary(min_size=52, max_size=52))
def test_fields_that_version_1_has_not_are_refused_under_a_right_crc(fields: bytes) -> None:
    data = with_crc(b"KVBMOBJ\0" + fields)
    try:
        header = ObjectHeader.decode(data)
    except GarbageError:
        return
    assert header.encode() == data


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (8, b"\2\0\0\0", "version 2"),
        (12, b"\3\0\0\0", "has a value where"),
        (12, b"\0\0\0\0", "has a value where"),  # a checksum that is said not to be kept
        (50, b"\1", "has a value where"),
    ],
)
def test_fields_of_another_version_are_named(place: int, value: bytes, reason: str) -> None:
    fields = bytearray(HEADER.encode()[:-4])
    fields[place : place + len(value)] = value
    with pytest.raises(GarbageError, match=reason):
        ObjectHeader.decode(with_crc(bytes(fields)))


def test_a_header_of_another_block_is_garbage() -> None:
    with pytest.raises(GarbageError, match="block 001020"):
        check_header(HEADER.encode(), bytes(16), 4096)
    with pytest.raises(GarbageError, match="4096 bytes, a block has 4095"):
        check_header(HEADER.encode(), NAME, 4095)


@given(st.text(max_size=40))
def test_only_32_hexadecimal_digits_are_a_hash(name: str) -> None:
    assert hash_in(f"a/b/{name}") is None or bytes.fromhex(name.rpartition("/")[2])


def test_the_name_of_a_block_is_its_hash() -> None:
    assert hash_in(f"kvbm/digest/{NAME.hex()}") == NAME
    for wrong in (NAME.hex().upper(), NAME.hex() + "0", NAME.hex()[:-1], f"{NAME.hex()}/probe", "probe"):
        assert hash_in(f"kvbm/{wrong}") is None
