"""The bytes of an index file: what is damaged is never believed, whatever the damage."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import SlabFormatError
from kvbm.storage.disk.format import (
    FREE,
    HEADER_NBYTES,
    LIVE,
    MAX_FINGERPRINT_NBYTES,
    RECORD_DTYPE,
    RECORD_NBYTES,
    VERSION,
    Header,
    RecordArray,
    SlabVersionError,
    choose_header,
    crc_of,
    decode_header,
    encode_header,
    is_live,
    seal,
)

U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    lambda slots, block, gap, made_at, sequence, generation, text: Header(
        slots, block, block + gap, made_at, sequence, generation, text
    ),
    st.integers(1, 2**31 - 1),
    st.integers(1, 2**40),
    st.integers(0, 2**40),
    U64,
    U64,
    st.integers(0, 2**32 - 1),
    st.text(max_size=500).filter(lambda text: len(text.encode()) <= MAX_FINGERPRINT_NBYTES),
)
HEADER = Header(1000, 288, 4096, 17, 5, 3, "a model")


def make_records(seed: int, num_records: int, header: Header = HEADER) -> RecordArray:
    """Make records that count, of random content."""
    rng = np.random.default_rng(seed)
    records = np.zeros(num_records, dtype=RECORD_DTYPE)
    for name in ("hash", "parent", "checksum"):
        records[name] = rng.integers(0, 2**64, records[name].shape, dtype=np.uint64)
    for name in ("written_at", "used_at", "order"):
        records[name] = rng.integers(0, np.iinfo(RECORD_DTYPE[name]).max, num_records)
    records["priority"] = rng.integers(0, 101, num_records)
    records["length"], records["generation"], records["state"] = header.block_nbytes, header.generation, LIVE
    return seal(records)


def flip(data: bytes, *bits: int) -> bytes:
    turned = bytearray(data)
    for bit in bits:
        turned[bit // 8] ^= 1 << bit % 8
    return bytes(turned)


def with_crc(body: bytes) -> bytes:
    """Give a header these bytes and a CRC that holds."""
    return body[: HEADER_NBYTES - 4] + zlib.crc32(body[: HEADER_NBYTES - 4]).to_bytes(4, "little")


# -- headers ---------------------------------------------------------------------------------------------------


@given(HEADERS)
def test_a_header_comes_back_as_it_was(header: Header) -> None:
    data = encode_header(header)
    assert len(data) == HEADER_NBYTES
    assert decode_header(data) == header
    assert choose_header([data, bytes(HEADER_NBYTES)]) == header


@settings(deadline=None)
@given(HEADERS, st.sets(st.integers(0, HEADER_NBYTES * 8 - 1), min_size=1, max_size=3))
def test_a_header_with_turned_bits_is_refused(header: Header, bits: set[int]) -> None:
    with pytest.raises(SlabFormatError):
        decode_header(flip(encode_header(header), *bits))


def test_every_single_bit_of_a_header_counts() -> None:
    data = encode_header(HEADER)
    for bit in range(0, HEADER_NBYTES * 8):
        turned = flip(data, bit)
        # All but the magic is guarded by the CRC alone, which is checked in one place: do not decode 32,768 times.
        if bit < 1024 or bit >= (HEADER_NBYTES - 8) * 8 or bit % 97 == 0:
            with pytest.raises(SlabFormatError):
                decode_header(turned)


@given(st.binary(max_size=200), st.sampled_from([0, 1, 200, HEADER_NBYTES - 1, HEADER_NBYTES, HEADER_NBYTES + 1]))
def test_bytes_that_are_no_header_are_refused(data: bytes, nbytes: int) -> None:
    data = data.ljust(nbytes, b"\0")[:nbytes]
    with pytest.raises(SlabFormatError):
        decode_header(data)
    with pytest.raises(SlabFormatError):
        choose_header([data, data])


@given(st.binary(min_size=72, max_size=400))
def test_a_header_that_only_its_crc_speaks_for_is_sane_or_refused(data: bytes) -> None:
    body = (b"KVBMSLAB" + VERSION.to_bytes(4, "little") + (64).to_bytes(4, "little") + data).ljust(HEADER_NBYTES, b"\0")
    try:
        header = decode_header(with_crc(body))
    except SlabFormatError:
        return
    assert 0 < header.block_nbytes <= header.slot_nbytes
    assert 0 < header.num_slots < 2**31
    assert encode_header(header)[:64] == body[:64]


def test_a_header_says_what_is_wrong_with_it() -> None:
    data = encode_header(HEADER)
    assert choose_header([data]).fingerprint == "a model"
    for wrong, text in [
        (b"x" + data[1:], "its first bytes are not KVBMSLAB"),
        (data[:100], "a slab's header has 4096 bytes, got 100"),
        (flip(data, 900), "its CRC does not hold"),
        (with_crc(data[:16] + bytes(8) + data[24:]), "its sizes are impossible"),
        (with_crc(data[:64] + b"\xff" + data[65:]), "its fingerprint is no text"),
    ]:
        with pytest.raises(SlabFormatError, match=text):
            decode_header(wrong)
    with pytest.raises(SlabFormatError, match="it is empty"):
        choose_header([])
    with pytest.raises(SlabFormatError, match=f"a fingerprint of {MAX_FINGERPRINT_NBYTES + 1} bytes is too long"):
        encode_header(Header(1, 1, 1, 0, 0, 0, "x" * (MAX_FINGERPRINT_NBYTES + 1)))
    assert decode_header(encode_header(Header(1, 1, 1, 0, 0, 0, "x" * MAX_FINGERPRINT_NBYTES))).num_slots == 1


@pytest.mark.parametrize("at", [8, 12])
def test_another_version_is_told_from_damage(at: int) -> None:
    data = encode_header(HEADER)
    other = with_crc(data[:at] + (2).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(SlabVersionError, match="use the package that wrote it, or on_mismatch='replace'"):
        decode_header(other)
    for copies in ([other, data], [data, other]):  # who wrote the other copy may have written records too
        with pytest.raises(SlabVersionError):
            choose_header(copies)


def test_of_two_headers_the_later_counts_and_a_damaged_one_never() -> None:
    old, new = encode_header(HEADER), encode_header(Header(1000, 288, 4096, 17, 6, 4, "a model"))
    for copies in ([old, new], [new, old]):
        assert choose_header(copies).generation == 4
    for copies in ([old, flip(new, 999)], [flip(new, 5), old]):
        assert choose_header(copies).generation == 3
    with pytest.raises(SlabFormatError):
        choose_header([flip(old, 999), flip(new, 999)])


# -- records ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 2, 63, 64, 65, 1000, (1 << 14) - 1, 1 << 14, (1 << 14) + 1]))
def test_the_crc_of_records_is_that_of_zlib(seed: int, num_records: int) -> None:
    data = random.Random(seed).randbytes(num_records * RECORD_NBYTES)
    records = np.frombuffer(data, dtype=RECORD_DTYPE)
    rows = [data[i * RECORD_NBYTES : (i + 1) * RECORD_NBYTES - 4] for i in range(num_records)]
    assert crc_of(records).tolist() == [zlib.crc32(row) for row in rows]


def test_the_crc_of_records_that_lie_apart_is_the_same() -> None:
    records = make_records(1, 100)
    assert crc_of(records[::7]).tolist() == crc_of(records)[::7].tolist()


@given(st.integers(0, 2**32), st.sets(st.integers(0, RECORD_NBYTES * 8 - 1), min_size=1, max_size=3))
def test_a_record_with_turned_bits_is_not_believed(seed: int, bits: set[int]) -> None:
    record = make_records(seed, 1)
    assert is_live(record, HEADER).tolist() == [True]
    turned = np.frombuffer(flip(record.tobytes(), *bits), dtype=RECORD_DTYPE)
    assert is_live(turned, HEADER).tolist() == [False]


def test_every_single_bit_of_a_record_counts() -> None:
    data = make_records(1, 1).tobytes()
    turned = b"".join(flip(data, bit) for bit in range(RECORD_NBYTES * 8))
    assert not is_live(np.frombuffer(turned, dtype=RECORD_DTYPE), HEADER).any()


@given(st.lists(st.binary(min_size=RECORD_NBYTES, max_size=RECORD_NBYTES), max_size=20))
def test_random_bytes_are_no_record(rows: list[bytes]) -> None:
    records = np.frombuffer(b"".join(rows), dtype=RECORD_DTYPE)
    assert not is_live(records, HEADER).any()


@given(st.integers(0, 2**32), st.integers(0, 63), st.integers(1, 64))
def test_a_record_that_is_half_another_is_not_believed(seed: int, begin: int, nbytes: int) -> None:
    old, new = (row.tobytes() for row in make_records(seed, 2).reshape(2, 1))
    torn = old[:begin] + new[begin : begin + nbytes] + old[begin + nbytes :]
    (is_believed,) = is_live(np.frombuffer(torn, dtype=RECORD_DTYPE), HEADER).tolist()
    assert is_believed == (torn in (old, new))


def test_a_whole_record_that_cannot_count_is_not_believed() -> None:
    for field, value in [("length", 287), ("generation", 2), ("generation", 4), ("state", FREE), ("priority", 101)]:
        record = make_records(1, 1)
        record[field] = value
        assert is_live(seal(record), HEADER).tolist() == [False], field
    record = make_records(1, 1)
    record["priority"] = 100
    assert is_live(seal(record), HEADER).tolist() == [True]
