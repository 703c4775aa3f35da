"""What the two halves of a connector tell each other once a step, over the engine's own channel.

The scheduler's half sends one `StepOrders` to every worker, each worker sends one `StepReport` back; jobs and results
inside are those of `kvbm.jobs`. Decoders refuse whatever is not exactly a message of this version.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvbm.errors import MessageError

VERSION = 1


class LoadOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """Jobs that bring the blocks of one request; when all have ended the request is to be reported as received.

    A synchronous one is over before the pass of this step reads the blocks, and is not reported.

    Attributes
    ----------
    request_id : str
    job_ids : list of (int, int)
        Group and number of jobs into the engine's memory, sent in these orders or before.
    lost_slots : list of int
        Slots that nothing will be brought to: to be reported as failed with the request.
    is_sync : bool
        The step's own pass reads the blocks.
    """

    request_id: str
    job_ids: list[tuple[int, int]] = []
    lost_slots: list[int] = []
    is_sync: bool = False


class HoldOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """A request that has ended while its blocks were being saved; when those jobs have ended it is to be reported."""

    request_id: str
    job_ids: list[tuple[int, int]]


class StepOrders(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the workers are to do in one step.

    Attributes
    ----------
    jobs : list of list of bytes
        For each group of layers its encoded jobs (`kvbm.jobs.encode`), in the order in which they were sent.
    loads : list of LoadOrder
    holds : list of HoldOrder
    has_fence : bool
        Blocks that are being saved are about to be overwritten: those jobs end before the step goes on.
    """

    jobs: list[list[bytes]] = []
    loads: list[LoadOrder] = []
    holds: list[HoldOrder] = []
    has_fence: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (any(self.jobs) or self.loads or self.holds or self.has_fence)


class StepReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What one worker has done since its last report.

    Attributes
    ----------
    rank : int
    results : list of list of bytes
        For each group of layers its encoded results (`kvbm.jobs.encode`).
    """

    rank: int
    results: list[list[bytes]] = []


def encode_orders(orders: StepOrders) -> bytes:
    """Turn orders into bytes; `NO_ORDERS` where there is nothing to do."""
    return NO_ORDERS if orders.is_empty else bytes([VERSION]) + _ENCODER.encode(orders)


def encode_report(report: StepReport) -> bytes:
    """Turn a report into bytes."""
    return bytes([VERSION]) + _ENCODER.encode(report)


def decode_orders(data: bytes) -> StepOrders:
    """Read orders; raises `MessageError` where these bytes are none."""
    orders: StepOrders = _decode(_ORDERS, data)
    for order in orders.loads:
        if any(slot < 0 for slot in order.lost_slots):
            raise MessageError(f"request {order.request_id!r} names the slot {min(order.lost_slots)}")
    return orders


def decode_report(data: bytes) -> StepReport:
    """Read a report; raises `MessageError` where these bytes are none."""
    report: StepReport = _decode(_REPORT, data)
    if report.rank < 0:
        raise MessageError(f"a report of rank {report.rank}, ranks are 0 or more")
    return report


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    if not data or data[0] != VERSION:
        version = f"version {data[0]}" if data else "nothing"
        raise MessageError(f"expected a step message of version {VERSION}, got {version}: use one kvbm everywhere")
    try:
        return decoder.decode(data[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise MessageError(f"not a step message: {error}") from error


_ENCODER = msgspec.msgpack.Encoder()
_ORDERS = msgspec.msgpack.Decoder(StepOrders)
_REPORT = msgspec.msgpack.Decoder(StepReport)
NO_ORDERS = bytes([VERSION]) + _ENCODER.encode(StepOrders())  # most steps have none
