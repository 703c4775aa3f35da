"""A real S3 server behind a proxy that misbehaves: a retry or a miss in time, never a wrong byte, never a hang."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from object_site import PATIENCE_S, Blocks, MakeStorage

from kvbm.errors import StorageError
from kvbm.layout import BlockLayout
from kvbm.storage.object_store import RetryLimits
from kvbm.testing.proxy import FaultyProxy, ProxyFault

WIDE = BlockLayout.fully_contiguous(
    num_blocks=16, num_layers=4, outer_dim=2, block_size=16, inner_dim=512, dtype="uint8"
)  # 64 KiB
TIMEOUT_S = 0.5
DEADLINE_S = 2.5
SLACK_S = 5.0  # for a machine that does other things too

FAULTS = [fault for fault in ProxyFault if fault is not ProxyFault.NONE]
ANSWER_LOST = (ProxyFault.HALF_OPEN, ProxyFault.TRUNCATED)  # the server did what it was asked to
LOST = [fault for fault in FAULTS if fault not in (ProxyFault.LATENCY, ProxyFault.FLIPPED)]


def settings_for(proxy: FaultyProxy, **more: object) -> dict[str, object]:
    settings = {"port": proxy.port, "layout": WIDE, "timeout_s": TIMEOUT_S, "deadline_s": DEADLINE_S}
    return {**settings, "max_failures": 1000, **more}


@pytest.mark.parametrize("part_nbytes", [1 << 20, 30_000], ids=["whole", "parts"])
@pytest.mark.parametrize("fault", LOST)
def test_a_fault_that_passes_is_retried(
    make_s3: MakeStorage, proxy: FaultyProxy, fault: ProxyFault, part_nbytes: int
) -> None:
    storage, blocks = make_s3(**settings_for(proxy, part_nbytes=part_nbytes)), Blocks(4, WIDE)
    if part_nbytes > 1 << 16:  # an upload in parts is several requests, and one retry repeats them all
        proxy.inject(fault, num_requests=2)
    assert blocks.write(storage) == [True] * 4
    proxy.inject(fault, num_requests=2)
    assert blocks.read(storage) == [True] * 4
    assert storage.counters.num_retries >= 2
    assert storage.is_available


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_misses_within_the_deadline(
    make_s3: MakeStorage, proxy: FaultyProxy, fault: ProxyFault
) -> None:
    direct, storage = (
        make_s3(prefix=f"stays-{fault.name}", layout=WIDE),
        make_s3(**settings_for(proxy, prefix=f"stays-{fault.name}")),
    )
    blocks, fresh = Blocks(8, WIDE), Blocks(8, WIDE, seed=2)
    assert all(blocks.write(direct))
    proxy.latency_s = 0.02
    proxy.inject(fault)
    is_lost = fault in LOST
    began = time.monotonic()
    assert [not good for good in fresh.write(storage)] == [is_lost] * 8
    if fault is not ProxyFault.FLIPPED:
        assert [not good for good in blocks.read(storage)] == [is_lost] * 8
        assert storage.holds(blocks.ids, blocks.hashes).tolist() == [not is_lost] * 8
    assert time.monotonic() - began < 3 * DEADLINE_S + SLACK_S
    if is_lost:
        with pytest.raises(StorageError):
            storage.forget(blocks.hashes)
        assert storage.counters.num_failures
    proxy.inject(ProxyFault.NONE)
    assert all(fresh.write(storage))
    assert all(fresh.read(storage))
    if fault not in ANSWER_LOST:
        assert all(blocks.read(direct))


def test_a_flipped_bit_in_a_header_is_a_miss_and_elsewhere_the_checksums_matter(
    make_s3: MakeStorage, proxy: FaultyProxy
) -> None:
    storage, blocks = make_s3(**settings_for(proxy)), Blocks(4, WIDE)
    assert all(blocks.write(storage))
    proxy.inject(ProxyFault.FLIPPED)  # in the middle of the body
    good = blocks.submit_read(storage).result(PATIENCE_S)
    assert good.all()
    assert (np.count_nonzero(blocks.back != blocks.data, axis=1) == 1).all()
    assert np.array_equal(storage.checksums[blocks.ids], blocks.checksums)  # what the executor compares with


def test_a_read_that_timed_out_never_writes_into_its_rows(make_s3: MakeStorage, proxy: FaultyProxy) -> None:
    storage, blocks = make_s3(**settings_for(proxy, deadline_s=0.2, timeout_s=60.0)), Blocks(4, WIDE)
    assert all(blocks.write(make_s3(**settings_for(proxy, prefix="late"))))
    late = make_s3(**settings_for(proxy, prefix="late", deadline_s=0.2, timeout_s=60.0))
    proxy.latency_s = 0.6
    proxy.inject(ProxyFault.LATENCY)
    reading = blocks.submit_read(late)
    assert reading.result(PATIENCE_S).tolist() == [False] * 4
    blocks.back[:] = 0x11  # the rows are another's
    proxy.inject(ProxyFault.NONE)
    assert proxy.wait_until_idle(PATIENCE_S)  # the answers have come
    assert all(Blocks(2, WIDE, seed=3).write(storage))
    assert (blocks.back == 0x11).all()
    assert not late.has_checksum.any()


def test_a_server_that_goes_and_comes_back(make_s3: MakeStorage, proxy: FaultyProxy) -> None:
    storage = make_s3(
        **settings_for(proxy, max_failures=4, cool_down_s=0.02, retries=RetryLimits(max_attempts=2, backoff_s=0.001))
    )
    blocks, is_back, heard = Blocks(8, WIDE), threading.Event(), []

    def listen(is_available: bool) -> None:
        heard.append(is_available)
        if is_available:
            is_back.set()

    storage.on_availability(listen)
    assert all(blocks.write(storage))
    proxy.disconnect()
    assert not any(blocks.read(storage))
    assert not any(blocks.write(storage))
    assert not storage.is_available
    assert storage.counters.num_breaker_opens == 1
    num_requests = storage.counters.num_requests
    assert not storage.holds(blocks.ids, blocks.hashes).any()
    assert storage.counters.num_requests - num_requests <= 2  # probes only
    proxy.connect()
    assert is_back.wait(PATIENCE_S)
    assert heard == [False, True]
    assert all(blocks.read(storage))
    assert all(blocks.write(storage))


def test_large_blocks_are_uploaded_in_parts(make_s3: MakeStorage, proxy: FaultyProxy) -> None:
    layout = BlockLayout.fully_contiguous(
        num_blocks=2, num_layers=6, outer_dim=2, block_size=16, inner_dim=65536, dtype="uint8"
    )  # 12 MiB
    storage = make_s3(port=proxy.port, layout=layout, part_nbytes=5 << 20)
    blocks = Blocks(2, layout)
    assert all(blocks.write(storage))
    assert proxy.num_requests >= 2 * 5  # begin, three parts, complete
    num_before = proxy.num_requests
    assert all(blocks.read(storage))
    assert proxy.num_requests - num_before == 2 * 3
    assert storage.holds(blocks.ids, blocks.hashes).all()


def test_requests_at_the_server_are_bounded(make_s3: MakeStorage, proxy: FaultyProxy) -> None:
    storage, blocks = make_s3(port=proxy.port, layout=WIDE, max_concurrency=3), Blocks(16, WIDE)
    assert all(blocks.write(storage))
    assert all(blocks.read(storage))
    assert storage.holds(blocks.ids, blocks.hashes).all()
    assert proxy.max_at_once <= 6  # the proxy may see the next request before it has noted the end of the last
