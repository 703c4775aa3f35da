"""What crosses between processes comes back as it was, and whatever else comes is refused without harm."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvbm.errors import MessageError
from kvbm.jobs import (
    CopyJob,
    ForgetJob,
    InventoryJob,
    JobResult,
    ProbeJob,
    TouchedJob,
    decode_job,
    decode_result,
    encode,
)
from kvbm.jobs.messages import PROTOCOL_VERSION, num_blocks_of
from kvbm.types import Tier

JOB_KINDS = (CopyJob, ForgetJob, TouchedJob, ProbeJob, InventoryJob)
TIERS = st.sampled_from(list(Tier))
COUNTS = st.integers(0, 5)
HEAD = bytes([PROTOCOL_VERSION])


def batch(draw: st.DrawFn, num_blocks: int, dtype: str, most: int) -> Any:
    values = draw(st.lists(st.integers(0, most), min_size=num_blocks, max_size=num_blocks))
    return np.array(values, dtype=dtype)


def hashes(draw: st.DrawFn, num_blocks: int) -> Any:
    data = draw(st.binary(min_size=16 * num_blocks, max_size=16 * num_blocks))
    return np.frombuffer(data, dtype=np.uint64).reshape(-1, 2)


@st.composite
def jobs(draw: st.DrawFn) -> Any:
    kind, n = draw(st.sampled_from(JOB_KINDS)), draw(COUNTS)
    given_fields: dict[str, Any] = {
        "job_id": draw(st.integers(0, 2**63 - 1)),
        "tier": draw(TIERS),
        "source": draw(TIERS),
        "destination": draw(TIERS),
        "ids": batch(draw, n, "int32", 2**31 - 1),
        "source_ids": batch(draw, n, "int32", 2**31 - 1),
        "destination_ids": batch(draw, n, "int32", 2**31 - 1),
        "hashes": hashes(draw, n),
        "parents": draw(st.none() | st.just(0)) if kind is CopyJob else None,
        "priorities": batch(draw, n, "uint8", 100),
        "timeout_s": draw(st.none() | st.floats(allow_nan=False)),
        "is_urgent": draw(st.booleans()),
        "is_alone": draw(st.booleans()),
        "is_all": draw(st.booleans()),
    }
    if given_fields["parents"] is not None:
        given_fields["parents"] = hashes(draw, n)
    return kind(**{name: given_fields[name] for name in kind.__struct_fields__})


@st.composite
def results(draw: st.DrawFn) -> Any:
    n = draw(COUNTS)
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found = {
            "ids": batch(draw, n, "int32", 2**31 - 1),
            "hashes": hashes(draw, n),
            "parents": hashes(draw, n),
            "priorities": batch(draw, n, "uint8", 100),
        }
    return JobResult(
        job_id=draw(st.integers(0, 2**63 - 1)),
        outcomes=batch(draw, draw(COUNTS), "uint8", 3),
        nbytes=draw(st.integers(0, 2**60)),
        seconds=draw(st.floats(0, 1e9)),
        reason=draw(st.text(max_size=20)),
        is_away=draw(st.booleans()),
        **found,
    )


def assert_same(got: Any, wanted: Any) -> None:
    assert type(got) is type(wanted)
    for name in wanted.__struct_fields__:
        a, b = getattr(got, name), getattr(wanted, name)
        if isinstance(b, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert np.array_equal(a, b), name
        else:
            assert a == b, name


def assert_safe(message: Any) -> None:
    """Nobody can reach the received bytes through a message."""
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, np.ndarray):
            assert value.flags.owndata or not value.flags.writeable, name


def feed(data: bytes) -> None:
    """Give bytes to both decoders; they answer, or raise MessageError and nothing else."""
    for decode in (decode_job, decode_result):
        try:
            message = decode(data)
        except MessageError:
            continue
        assert_safe(message)
        if not isinstance(message, JobResult):
            assert num_blocks_of(message) >= 0


def wire(kind: str | None, **fields: Any) -> bytes:
    """Make a message by hand, right or wrong."""
    body = fields if kind is None else {"type": kind, **fields}
    return HEAD + msgspec.msgpack.encode(body)


def test_wire_by_hand_is_what_encode_makes() -> None:
    job = ProbeJob(job_id=3, tier=Tier.DISK, ids=np.array([7], np.int32), hashes=np.zeros((1, 2), np.uint64))
    assert_same(decode_job(wire("probe", job_id=3, tier="disk", ids=bytes([7, 0, 0, 0]), hashes=bytes(16))), job)
    assert encode(job)[:1] == HEAD


@given(jobs())
def test_every_job_comes_back_as_it_was(job: Any) -> None:
    got = decode_job(encode(job))
    assert_same(got, job)
    assert_safe(got)


@given(results())
def test_every_result_comes_back_as_it_was(result: JobResult) -> None:
    got = decode_result(encode(result))
    assert_same(got, result)
    assert_safe(got)


def test_arrays_that_are_not_contiguous_cross_too() -> None:
    ids = np.arange(10, dtype=np.int32)[::-2]
    names = np.arange(40, dtype=np.uint64).reshape(10, 4)[::2, ::2]
    got = decode_job(encode(ProbeJob(job_id=1, tier=Tier.HOST, ids=ids, hashes=names)))
    assert np.array_equal(got.ids, ids)
    assert np.array_equal(got.hashes, names)


def test_reason_that_names_a_file_in_no_encoding_still_crosses() -> None:
    reason = "cannot read " + b"/data/\xff".decode("utf-8", "surrogateescape")
    got = decode_result(encode(JobResult(job_id=1, outcomes=np.full(2, 2, np.uint8), reason=reason)))
    assert got.reason == r"cannot read /data/\udcff"
    assert got.outcomes.tolist() == [2, 2]


@given(st.binary(max_size=200))
@example(b"")
@example(HEAD)
def test_random_bytes_are_messages_or_refused(data: bytes) -> None:
    feed(data)
    feed(HEAD + data)


@settings(max_examples=300)
@given(jobs() | results(), st.data())
def test_mutated_messages_are_messages_or_refused(message: Any, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "flip", "drop", "insert", "swap"]))
        if how == "set":
            raw[at] = data.draw(st.sampled_from([0x00, 0x7F, 0x80, 0x90, 0xC0, 0xC6, 0xC9, 0xDB, 0xDD, 0xDF, 0xFF]))
        elif how == "flip":
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "drop" and len(raw) > 1:
            del raw[at]
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        else:
            other = data.draw(st.integers(0, len(raw) - 1))
            raw[at], raw[other] = raw[other], raw[at]
    feed(bytes(raw))


@given(jobs() | results())
def test_no_message_survives_being_cut_short_or_drawn_out(message: Any) -> None:
    raw = encode(message)
    decode = decode_result if isinstance(message, JobResult) else decode_job
    for data in [*(raw[:end] for end in range(len(raw))), raw + b"\x00", raw + raw]:
        with pytest.raises(MessageError):
            decode(data)


@given(jobs(), results())
def test_neither_decoder_takes_the_other_kind(job: Any, result: JobResult) -> None:
    with pytest.raises(MessageError):
        decode_result(encode(job))
    with pytest.raises(MessageError):
        decode_job(encode(result))


@pytest.mark.parametrize("version", [0, 2, 0x82, 255])
def test_other_versions_are_refused_with_what_to_do(version: int) -> None:
    raw = bytes([version]) + encode(InventoryJob(job_id=1, tier=Tier.DISK))[1:]
    for decode in (decode_job, decode_result):
        with pytest.raises(
            MessageError, match=rf"a message of version 1, got version {version}: update the older side"
        ):
            decode(raw)
    with pytest.raises(MessageError, match="got nothing"):
        decode_job(b"")


PROBE = {"job_id": 1, "tier": "disk", "ids": bytes(8), "hashes": bytes(32)}
COPY = {
    "job_id": 1,
    "source": "host",
    "destination": "disk",
    "source_ids": bytes(8),
    "destination_ids": bytes(8),
    "hashes": bytes(32),
}
MINUS_ONE = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        ("probe", PROBE | {"ids": bytes(12)}, "different numbers of blocks.*'ids': 3, 'hashes': 2"),
        ("probe", PROBE | {"ids": bytes(7)}, "bytes of a batch of int32"),
        ("probe", PROBE | {"hashes": bytes(24)}, "bytes of a batch of uint64"),
        ("probe", PROBE | {"hashes": "text"}, "bytes of a batch of uint64"),
        ("probe", PROBE | {"hashes": None}, "bytes of a batch of uint64"),
        ("probe", PROBE | {"ids": [0, 1]}, "bytes of a batch of int32"),
        ("probe", PROBE | {"ids": bytes(4) + MINUS_ONE}, "block id -1 is negative"),
        ("probe", PROBE | {"tier": "tape"}, "tape"),
        ("probe", PROBE | {"job_id": "1"}, "job_id"),
        ("probe", PROBE | {"job_id": 1.0}, "job_id"),
        ("probe", PROBE | {"shell": "rm"}, "shell"),
        ("probe", {"job_id": 1, "tier": "disk"}, "ids"),
        ("touched", PROBE, "priorities"),
        ("touched", PROBE | {"priorities": bytes(3)}, "'priorities': 3"),
        ("copy", COPY | {"destination_ids": bytes(4)}, "'destination_ids': 1"),
        ("copy", COPY | {"source_ids": bytes(4) + MINUS_ONE}, "block id -1 is negative"),
        ("copy", COPY | {"destination_ids": MINUS_ONE + bytes(4)}, "block id -1 is negative"),
        ("copy", COPY | {"parents": bytes(16)}, "'parents': 1"),
        ("copy", COPY | {"priorities": bytes(1)}, "'priorities': 1"),
        ("copy", COPY | {"timeout_s": math.nan}, "timeout_s is not a number"),
        ("copy", COPY | {"timeout_s": "soon"}, "timeout_s"),
        ("copy", COPY | {"is_urgent": 1}, "is_urgent"),
        ("reset", PROBE, "reset"),
        (None, PROBE, "type"),
    ],
)
def test_wrong_jobs_are_refused_with_what_is_wrong(kind: str | None, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(MessageError, match=text):
        decode_job(wire(kind, **fields))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"outcomes": bytes([0, 4])}, "outcome 4 is not known, at most 3 is"),
        ({"outcomes": b"\xff"}, "outcome 255 is not known"),
        ({"nbytes": -1}, "nbytes is -1"),
        ({"seconds": math.nan}, "seconds nan"),
        ({"seconds": math.inf}, "seconds inf"),
        ({"seconds": -0.5}, "seconds -0.5"),
        ({"ids": bytes(8), "hashes": bytes(16)}, r"batches of \[1, 2\] blocks, need one length"),
        ({"ids": MINUS_ONE}, "block id -1 is negative"),
        ({"ids": bytes(5)}, "bytes of a batch of int32"),
        ({"reason": b"why"}, "reason"),
        ({"rank": 0}, "rank"),
    ],
)
def test_wrong_results_are_refused_with_what_is_wrong(fields: dict[str, Any], text: str) -> None:
    right = {"job_id": 1, "outcomes": b""}
    assert decode_result(wire(None, **right)).job_id == 1
    with pytest.raises(MessageError, match=text):
        decode_result(wire(None, **(right | fields)))


CLAIMS = {
    "array": b"\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff",
    "text": b"\xdb\xff\xff\xff\xff",
    "extension": b"\xc9\xff\xff\xff\xff\x05",
    "small array": b"\xdd\x00\x10\x00\x00",
    "arrays in arrays": b"\x91" * 1_000_000,
    "maps in maps": b"\x81\x01" * 500_000,
    "map with a list as key": b"\x81\x91\x00\x00",
    "map with a map as key": b"\x81\x81\x00\x00\x00",
    "map with a list of a map as key": b"\x81\x91\x81\x00\x00\x00",
    "time that never was": b"\xc7\x0c\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff",
    "extension of ours": b"\xc7\x04\x01abcd",
    "time": b"\xd6\xff\xff\xff\xff\xff",
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
@pytest.mark.parametrize("key", ["ids", "outcomes", "tier", "job_id", "reason", "unknown", "type"])
def test_what_a_message_claims_costs_no_memory(key: str, claim: bytes) -> None:
    tag = b"" if key == "type" else b"\xa4type\xa6forget"
    raw = HEAD + bytes([0x81 + bool(tag)]) + tag + msgspec.msgpack.encode(key) + claim
    tracemalloc.start()
    try:
        feed(raw)
        feed(HEAD + claim)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(raw) + (1 << 20), "a few bytes must not make us allocate what they claim"


def test_a_long_message_costs_little_more_than_its_length() -> None:
    num_blocks = 200_000
    job = ProbeJob(
        job_id=1, tier=Tier.DISK, ids=np.zeros(num_blocks, np.int32), hashes=np.zeros((num_blocks, 2), np.uint64)
    )
    raw = encode(job)
    tracemalloc.start()
    try:
        got = decode_job(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(got.ids) == num_blocks
    assert peak < 2.2 * len(raw) + (1 << 20)
