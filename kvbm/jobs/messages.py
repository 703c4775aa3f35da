"""Jobs and their results: what crosses the wall between bookkeeping and bytes.

In one process they are passed as they are; between processes `encode` and the two decoders turn them into bytes.
Decoders refuse whatever is not exactly a message, so a half that talks nonsense cannot move a byte. A job carries the
seconds that remain, never a clock.
"""

from __future__ import annotations

import enum
import math
from typing import Any, TypeAlias, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from kvbm.errors import MessageError
from kvbm.types import HashArray, IdArray, Tier

PROTOCOL_VERSION = 1

ByteArray: TypeAlias = "npt.NDArray[np.uint8]"


class Outcome(enum.IntEnum):
    """What became of one block of a job; the largest of several ranks counts."""

    OK = 0
    LATE = 1  # not begun before the job's time was over; its bytes may be good
    FAILED = 2  # could not be read or written
    CORRUPT = 3  # the source did not match its checksum


class CopyJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="copy"):
    """Copy blocks from slots of one tier into slots of another, checked against their checksums.

    Attributes
    ----------
    job_id : int
    source, destination : Tier
    source_ids, destination_ids : (num_blocks,) int32
    hashes : (num_blocks, 2) uint64
    parents, priorities : (num_blocks, 2) uint64 and (num_blocks,) uint8, or None
        What a destination that outlives the process records with the bytes.
    timeout_s : float or None
        Seconds that remain when it is sent.
    is_urgent : bool
        Somebody waits for it (onboard); otherwise nobody does (offload).
    is_alone : bool
        Nothing else was sent for whoever waits: small enough, it may run in the thread that sends it.
    """

    job_id: int
    source: Tier
    destination: Tier
    source_ids: npt.NDArray[np.int32]
    destination_ids: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    parents: npt.NDArray[np.uint64] | None = None
    priorities: npt.NDArray[np.uint8] | None = None
    timeout_s: float | None = None
    is_urgent: bool = False
    is_alone: bool = False


class ForgetJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="forget"):
    """Blocks of a tier that no restart may find: in the slots given, or wherever they lie; with `is_all`, every block.

    Slots are given where nobody waits for the answer: the same blocks may have come back, in others, by then.
    """

    job_id: int
    tier: Tier
    hashes: npt.NDArray[np.uint64]
    ids: npt.NDArray[np.int32] | None = None
    is_all: bool = False


class TouchedJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="touched"):
    """Slots that were used again, oldest first, and their priorities: (num_blocks,) uint8."""

    job_id: int
    tier: Tier
    ids: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    priorities: npt.NDArray[np.uint8]


class ProbeJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="probe"):
    """Ask which slots hold the bytes of these hashes, in a keyed tier which keys; the result's outcomes say."""

    job_id: int
    tier: Tier
    ids: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]


class InventoryJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="inventory"):
    """Ask what a tier holds already, e.g. after a restart; the result brings ids, hashes, parents and priorities."""

    job_id: int
    tier: Tier


Job: TypeAlias = "CopyJob | ForgetJob | TouchedJob | ProbeJob | InventoryJob"


class JobResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of a job on one rank.

    Attributes
    ----------
    job_id : int
    outcomes : (num_blocks,) uint8
        An `Outcome` for each block of the job.
    nbytes : int
        Bytes that were moved.
    seconds : float
        From the start of the work to its end.
    reason : str
        Why blocks failed; empty when none did.
    is_away : bool
        The lower tier cannot be reached for now; what it holds may be good.
    ids, hashes, parents, priorities
        Of an inventory: (num_found,) int32, (num_found, 2) uint64 twice, (num_found,) uint8; oldest first.
    """

    job_id: int
    outcomes: npt.NDArray[np.uint8]
    nbytes: int = 0
    seconds: float = 0.0
    reason: str = ""
    is_away: bool = False
    ids: npt.NDArray[np.int32] | None = None
    hashes: npt.NDArray[np.uint64] | None = None
    parents: npt.NDArray[np.uint64] | None = None
    priorities: npt.NDArray[np.uint8] | None = None


def num_blocks_of(job: Job) -> int:
    """Blocks that a job's result has an outcome for."""
    return 0 if isinstance(job, InventoryJob) else len(job.hashes)


def tiers_of(job: Job) -> tuple[Tier, ...]:
    """Give the tiers that a job is about."""
    return (job.source, job.destination) if isinstance(job, CopyJob) else (job.tier,)


def answer_all(job: Job, outcome: Outcome, reason: str) -> JobResult:
    """Make the result of a job whose blocks all fared alike."""
    outcomes = np.full(num_blocks_of(job), outcome, dtype=np.uint8)
    return JobResult(job_id=job.job_id, outcomes=outcomes, reason=reason)


def encode(message: Job | JobResult) -> bytes:
    """Turn a job or a result into bytes."""
    try:
        return bytes([PROTOCOL_VERSION]) + _ENCODER.encode(message)
    except UnicodeEncodeError:  # the reason names a file whose name is not UTF-8
        assert isinstance(message, JobResult), "jobs hold no text"
        reason = message.reason.encode(errors="backslashreplace").decode()
        return encode(msgspec.structs.replace(message, reason=reason))


def decode_job(data: bytes) -> Job:
    """Read a job.

    Raises
    ------
    MessageError
        These bytes are not a job of this version.
    """
    job = _decode(_JOB_DECODER, data)
    if not isinstance(job, InventoryJob):
        lengths = {name: len(getattr(job, name)) for name in job.__struct_fields__ if _is_batch(getattr(job, name))}
        if len(set(lengths.values())) > 1:
            raise MessageError(f"a {type(job).__name__} names different numbers of blocks: {lengths}")
        for name in ("ids", "source_ids", "destination_ids"):
            ids = getattr(job, name, None)
            if ids is not None:
                _refuse_negative(ids)
    if isinstance(job, CopyJob) and job.timeout_s is not None and math.isnan(job.timeout_s):
        raise MessageError("timeout_s is not a number, need the seconds that remain")
    return job  # type: ignore[no-any-return]


def decode_result(data: bytes) -> JobResult:
    """Read a result.

    Raises
    ------
    MessageError
        These bytes are not a result of this version.
    """
    result = _decode(_RESULT_DECODER, data)
    found = {len(batch) for batch in (result.ids, result.hashes, result.parents, result.priorities) if _is_batch(batch)}
    if len(found) > 1:
        raise MessageError(f"an inventory has batches of {sorted(found)} blocks, need one length")
    if result.ids is not None:
        _refuse_negative(result.ids)
    if result.nbytes < 0 or not 0 <= result.seconds < math.inf:
        raise MessageError(f"nbytes is {result.nbytes} and seconds {result.seconds}, need finite numbers of 0 or more")
    if len(result.outcomes) and result.outcomes.max() > max(Outcome):
        raise MessageError(f"outcome {result.outcomes.max()} is not known, at most {max(Outcome):d} is")
    return result  # type: ignore[no-any-return]


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    if not data or data[0] != PROTOCOL_VERSION:
        version = f"version {data[0]}" if data else "nothing"
        raise MessageError(f"expected a message of version {PROTOCOL_VERSION}, got {version}: update the older side")
    try:
        return decoder.decode(data[1:])
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise MessageError(f"not a message: {error}") from error


def _refuse_negative(ids: IdArray) -> None:
    if len(ids) and ids.min() < 0:
        raise MessageError(f"block id {ids.min()} is negative")


def _is_batch(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value).tobytes()
    raise NotImplementedError(f"{type(value).__name__} does not cross the wall")


def _from_wire(kind: Any, value: Any) -> Any:
    # Of numpy.ndarray[shape, numpy.dtype[scalar]]; what NDArray[scalar] is besides differs between versions of NumPy.
    dtype = _DTYPES[get_args(get_args(kind)[1])[0]]
    width = 2 if dtype == np.uint64 else 1
    if not isinstance(value, bytes) or len(value) % (width * dtype.itemsize):
        raise ValueError(f"expected the bytes of a batch of {dtype}")
    batch = np.frombuffer(value, dtype=dtype)
    return batch.reshape(-1, 2) if width == 2 else batch


_DTYPES: dict[Any, np.dtype[Any]] = {
    np.int32: np.dtype("<i4"),
    np.uint64: np.dtype("<u8"),
    np.uint8: np.dtype("u1"),
}
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_JOB_DECODER = msgspec.msgpack.Decoder(CopyJob | ForgetJob | TouchedJob | ProbeJob | InventoryJob, dec_hook=_from_wire)
_RESULT_DECODER = msgspec.msgpack.Decoder(JobResult, dec_hook=_from_wire)

EMPTY_IDS: IdArray = np.empty(0, dtype=np.int32)
EMPTY_HASHES: HashArray = np.empty((0, 2), dtype=np.uint64)
EMPTY_OUTCOMES: ByteArray = np.empty(0, dtype=np.uint8)
