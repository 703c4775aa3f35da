"""The parts of a connector's core by themselves: messages, channels, digests, windows, shards."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.engines.arrange import make_group
from kvbm.engines.digests import Digests
from kvbm.engines.groups import longest_hit
from kvbm.engines.messages import (
    HoldOrder,
    LoadOrder,
    StepOrders,
    StepReport,
    decode_orders,
    decode_report,
    encode_orders,
    encode_report,
)
from kvbm.engines.requests import Request, RequestState
from kvbm.engines.shard import LayerMemory, Shard, ShardDescription, layout_of
from kvbm.engines.step_channel import StepChannels
from kvbm.errors import BlockStateError, ConfigError, HashFormatError, LayoutError, MessageError, PoolClosed
from kvbm.jobs import InventoryJob, JobResult
from kvbm.types import Tier

# -- messages -------------------------------------------------------------------------------------------------------


def test_messages_come_back_as_they_were() -> None:
    orders = StepOrders(
        jobs=[[b"one"], []],
        loads=[LoadOrder(request_id="a", job_ids=[(0, 1), (1, 2)], lost_slots=[3])],
        holds=[HoldOrder(request_id="b", job_ids=[(0, 7)])],
        has_fence=True,
    )
    assert decode_orders(encode_orders(orders)) == orders
    assert not orders.is_empty
    assert StepOrders(jobs=[[], []]).is_empty
    report = StepReport(rank=1, results=[[b"x"]])
    assert decode_report(encode_report(report)) == report


@given(st.binary(max_size=200))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    for decode in (decode_orders, decode_report):
        for raw in (data, b"\x01" + data):
            with contextlib.suppress(MessageError):  # and nothing else
                assert isinstance(decode(raw), (StepOrders, StepReport))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "got nothing"),
        (b"\x02\x80", "version 2"),
        (encode_orders(StepOrders(loads=[LoadOrder(request_id="a", lost_slots=[-1])])), "slot -1"),
    ],
)
def test_a_message_that_cannot_be_says_why(raw: bytes, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        decode_orders(raw)


def test_a_report_of_no_rank_is_refused() -> None:
    with pytest.raises(MessageError, match="rank -1"):
        decode_report(encode_report(StepReport(rank=-1)))


# -- channels -------------------------------------------------------------------------------------------------------


def inventory(job_id: int) -> InventoryJob:
    return InventoryJob(job_id=job_id, tier=Tier.DISK)


def answer(job_id: int) -> JobResult:
    return JobResult(job_id=job_id, outcomes=np.empty(0, dtype=np.uint8))


def test_a_job_of_all_ranks_is_ordered_once_and_answered_by_each() -> None:
    group = StepChannels(2)
    heard: list[tuple[int, int]] = []
    for rank, channel in enumerate(group.channels):
        channel.open(lambda result, rank=rank: heard.append((rank, result.job_id)), lambda reason: None)  # type: ignore[misc]
        channel.send(inventory(5))
    assert [job.job_id for job in group.take_jobs()] == [5]
    assert group.take_jobs() == []
    group.receive(1, [answer(5), answer(5), answer(9)])
    assert heard == [(1, 5)]
    assert group.channels[0].knows(5)
    assert not group.channels[1].knows(5)
    assert group.has_jobs
    group.receive(0, [answer(5)])
    assert heard == [(1, 5), (0, 5)]
    assert not group.has_jobs
    assert group.channels[0].close()
    with pytest.raises(PoolClosed):
        group.channels[1].send(inventory(6))


def test_an_engine_without_requests_does_not_step_forever_for_an_answer() -> None:
    now = [0.0]
    group = StepChannels(1, clock=lambda: now[0])
    group.channels[0].open(lambda result: None, lambda reason: None)
    group.channels[0].send(inventory(5))
    now[0] = 100.0
    assert group.has_jobs, "it has not been ordered"
    now[0] = 0.0
    group.take_jobs()
    now[0] = 29.9
    assert group.has_jobs
    now[0] = 30.1
    assert not group.has_jobs
    assert not group.channels[0].close(), "whoever closes hears that it was not answered"
    group.receive(0, [answer(5)])
    assert group.channels[0].close()


def test_what_a_rank_said_at_the_start_answers_the_first_question() -> None:
    group = StepChannels(1)
    heard: list[int] = []
    group.channels[0].open(lambda result: heard.append(result.job_id), lambda reason: None)
    group.know(0, Tier.DISK, answer(0))
    group.channels[0].send(inventory(3))
    assert heard == [3]
    group.channels[0].send(inventory(4))
    assert [job.job_id for job in group.take_jobs()] == [4]


# -- digests and states ---------------------------------------------------------------------------------------------


def test_a_variant_changes_the_first_half_of_a_name_only() -> None:
    digests = [bytes([number]) * 32 for number in range(3)]
    plain, other = Digests().extend(digests), Digests(variant=2**64 - 1).extend(digests)
    assert np.array_equal(plain[:, 1], other[:, 1])
    assert not (plain[:, 0] == other[:, 0]).any()
    grown = Digests(variant=2**64 - 1)
    grown.extend(digests[:1])
    assert np.array_equal(grown.extend(digests), other)


@given(st.lists(st.binary(min_size=16, max_size=32), max_size=60), st.data())
def test_digests_are_cut_to_sixteen_bytes_however_they_grow(digests: list[bytes], data: st.DataObject) -> None:
    known = Digests()
    for end in sorted(data.draw(st.lists(st.integers(0, len(digests)), max_size=4))):
        known.extend(digests[:end])
    names = known.extend(digests)
    assert [row.tobytes() for row in names] == [digest[-16:] for digest in digests]
    assert not names.flags.writeable
    assert len(known) == len(digests)


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_names_that_an_engine_takes_back_are_forgotten_with_those_behind_them(
    before: list[int], after: list[int]
) -> None:
    def chain(tokens: list[int]) -> list[bytes]:
        return [bytes(tokens[:end]).ljust(8, b"x") + b"y" * 24 for end in range(1, len(tokens) + 1)]

    def name(digest: bytes) -> bytes:
        return digest[:16]  # what tells these apart

    known = Digests()
    old = known.extend([one[::-1] for one in chain(before)])
    was = old.copy()
    num_same = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(before))
    assert known.keep([one[::-1] for one in chain(after)]) == min(num_same, len(after))
    names = known.extend([one[::-1] for one in chain(after)])
    assert [row.tobytes()[::-1] for row in names] == [name(one) for one in chain(after)]
    assert np.array_equal(old, was), "whoever looks at the old ones sees no others"


def test_weak_digests_are_taken_only_when_that_is_said() -> None:
    with pytest.raises(HashFormatError, match="need 16 or more"):
        Digests().extend([b"short"])
    assert Digests(allow_weak=True).extend([b"short"])[0].tobytes() == b"short".rjust(16, b"\0")
    known = Digests()
    known.extend([bytes(16)] * 2)
    with pytest.raises(HashFormatError, match="named 1 blocks of a request that had 2"):
        known.extend([bytes(16)])


def test_no_step_leads_back_from_the_end() -> None:
    request = Request("a", Digests(), [0])
    request.go(RequestState.GONE)
    for state in RequestState:
        with pytest.raises(BlockStateError, match="cannot go from gone"):
            request.go(state)


# -- windows --------------------------------------------------------------------------------------------------------


def fits(window: int, has: list[bool], num_computed: int, length: int) -> bool:
    first = num_computed if not window else max(num_computed, length - window)
    return all(has[first:length])


@settings(max_examples=300)
@given(data=st.data())
def test_a_hit_is_the_longest_prefix_that_suits_every_group(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(0, 12))
    num_computed = data.draw(st.integers(0, num_blocks))
    windows = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    present = [data.draw(st.lists(st.booleans(), min_size=num_blocks, max_size=num_blocks)) for _ in windows]
    groups: list[Any] = []
    for window in windows:
        group = SimpleNamespace(window_blocks=window)
        group.first_needed = lambda computed, end, window=window: (
            computed if not window else max(computed, end - window)
        )
        groups.append(group)
    expected = max(
        length
        for length in range(num_computed, num_blocks + 1)
        if length == num_computed
        or all(fits(window, has, num_computed, length) for window, has in zip(windows, present, strict=True))
    )
    masks = [np.array(has, dtype=np.bool_) for has in present]
    assert longest_hit(groups, masks, num_computed, num_blocks) == expected


# -- shards ---------------------------------------------------------------------------------------------------------


def layers_of(num_layers: int, num_blocks: int = 4, nbytes: int = 64, gap: int = 0) -> list[LayerMemory]:
    memories = [np.zeros(num_blocks * (nbytes + gap), dtype=np.uint8) for _ in range(num_layers)]
    return [LayerMemory(memory.ctypes.data, num_blocks, nbytes + gap, nbytes, memory) for memory in memories]


@pytest.mark.parametrize("gap", [0, 32])
def test_a_shard_tells_what_the_scheduler_has_to_know(backend: Backend, tmp_path: Path, gap: int) -> None:
    tiers = {"host": {"num_blocks": 8}, "disk": {"num_blocks": 16, "path": str(tmp_path)}}
    shard = Shard(layers_of(3, gap=gap), tiers, fingerprint="m", backend=backend)
    try:
        told = shard.describe()
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=ShardDescription)
        assert again == told
        assert told.num_blocks == {"host": 8, "disk": 16}
        assert told.block_nbytes == 3 * 64
        assert (told.recording, told.keyed) == (["disk"], [])
        group = make_group([again], index=0, backend=backend)
        assert [pool.total_blocks for pool in group.planner.pools] == [8, 16]
        assert not group.channels.has_jobs
        group.planner.close(0.0)
    finally:
        shard.close()


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(LayoutError, match="no layer"):
        layout_of([])
    with pytest.raises(LayoutError, match="layer 1 has 4 blocks of 32 bytes"):
        layout_of([*layers_of(1), *layers_of(1, nbytes=32)])


def test_ranks_must_have_the_same_tiers_and_a_host_tier(backend: Backend) -> None:
    def told(**num_blocks: int) -> ShardDescription:
        return ShardDescription(num_blocks=num_blocks, block_nbytes=1, recording=[], keyed=[], inventories={})

    with pytest.raises(ConfigError, match="rank 1 has the tiers"):
        make_group([told(host=4), told(host=4, disk=8)], index=0, backend=backend)
    with pytest.raises(ConfigError, match="needs a host tier"):
        make_group([told()], index=0, backend=backend)
    group = make_group([told(host=4), told(host=3)], index=0, backend=backend)
    assert group.planner.pools[0].total_blocks == 3, "slots that all ranks have"
    group.planner.close(0.0)
