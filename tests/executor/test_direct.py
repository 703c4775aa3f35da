"""Reads straight into memory that only we hand out: places, bounds, checksums, and what may go wrong with a chunk.

CONFORMANCE 27. What happens when the time is over or somebody interrupts is in `test_direct_ends`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from keyed_site import PATIENCE_S, KeyedSite

from kvbm.errors import StorageError
from kvbm.executor import copy_up
from kvbm.jobs import Outcome
from kvbm.types import Tier

MakeKeyed = Callable[..., KeyedSite]
MakeSite = Callable[..., Any]
OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT
MIB = 1 << 20
SMALL: dict[str, Any] = {"num_blocks": 12, "nbytes": 4096, "staging_blocks": 8}
BACKWARDS = np.arange(12, dtype=np.int32)[::-1].copy()


@pytest.fixture
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut reads of blocks of 4096 bytes after four."""
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", 4 * 4096)


def computed(site: KeyedSite, ids: npt.NDArray[np.int32], hashes: Any) -> list[int]:
    checksums: list[int] = site.executor._means._urgent.compute_checksums(site.host, ids, hashes).tolist()
    return checksums


# -- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "num_blocks", "chunks"),
    [
        (1 << 16, 72, [16] * 4 + [8]),
        (1 << 16, 96, [16] * 6),
        (1 << 16, 16, [16]),
        (1 << 16, 17, [16, 1]),
        (1 << 21, 6, [1] * 6),  # one block is more than a chunk
        (1 << 16, 1, [1]),
    ],
)
def test_blocks_are_read_to_their_places_in_chunks_up_to_four_ahead(
    make_keyed: MakeKeyed, monkeypatch: pytest.MonkeyPatch, nbytes: int, num_blocks: int, chunks: list[int]
) -> None:
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", MIB)
    site = make_keyed(num_blocks=num_blocks, nbytes=nbytes, staging_blocks=1)
    site.fill_store(num_blocks)
    places = np.random.default_rng(8).permutation(num_blocks).astype(np.int32)
    store = site.store
    store.is_held = True
    thread = site.begin(site.job(Tier.REMOTE, Tier.HOST, num_blocks, destination_ids=places))
    for i in range(len(chunks)):
        num_open = min(4, len(chunks) - i)
        store.wait_for(i + num_open)
        assert len(store.calls) == i + num_open, "no more are read ahead"
        assert all(np.shares_memory(call.memory, site.host.buffers[0]) for call in store.calls[i:])
        assert site.ring.num_free == 1, "the ring is left to others"
        store.end(store.calls[i])
    thread.join(PATIENCE_S)
    assert [len(call.ids) for call in store.calls] == chunks
    assert np.concatenate([call.ids for call in store.calls]).tolist() == list(range(num_blocks)), "in order"
    assert np.concatenate([call.rows for call in store.calls]).tolist() == places.tolist()
    assert np.concatenate([call.hashes for call in store.calls]).tolist() == site.hashes.tolist()
    assert not site.results[0].outcomes.any()
    assert (site.results[0].nbytes, site.results[0].reason) == (num_blocks * nbytes, "")
    assert np.array_equal(site.host.read(places), site.data)


def test_one_read_moves_at_most_16_mib(make_keyed: MakeKeyed) -> None:
    assert copy_up._DIRECT_NBYTES == 16 * MIB
    site = make_keyed(num_blocks=18, nbytes=MIB, staging_blocks=1)
    site.fill_store(18)
    assert not site.up(18).outcomes.any()
    assert [len(call.ids) for call in site.store.calls] == [16, 2]


def test_chunks_that_have_come_wait_for_the_slow_one_before_them(make_keyed: MakeKeyed, chunks_of_four: None) -> None:
    site = make_keyed(num_blocks=20, nbytes=4096, staging_blocks=1)
    site.fill_store(20)
    site.store.is_held = True
    thread = site.begin(site.job(Tier.REMOTE, Tier.HOST, 20))
    site.store.wait_for(4)
    for call in site.store.calls[1:4]:
        site.store.end(call)
    assert len(site.store.calls) == 4
    assert not site.host.has_checksum.any(), "what has come counts only once it was compared"
    site.store.end(site.store.calls[0])
    site.store.wait_for(5)
    site.store.end(site.store.calls[4])
    thread.join(PATIENCE_S)
    assert not site.results[0].outcomes.any()
    assert site.host.has_checksum.all()
    assert np.array_equal(site.host.read(site.ids), site.data)


def test_two_jobs_at_once_read_each_to_its_own_places(make_keyed: MakeKeyed, chunks_of_four: None) -> None:
    site = make_keyed(**SMALL)
    site.fill_store(12)
    site.store.is_held = True
    first = site.job(Tier.REMOTE, Tier.HOST, 6)
    last = site.job(Tier.REMOTE, Tier.HOST, 12)
    last = type(last)(
        job_id=2, source=Tier.REMOTE, destination=Tier.HOST, source_ids=site.ids[6:], destination_ids=site.ids[6:],
        hashes=site.hashes[6:], is_urgent=False,
    )  # fmt: skip
    threads = [site.begin(first), site.begin(last)]
    site.store.wait_for(4)
    for call in site.store.calls[::-1]:
        site.store.end(call)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [result.outcomes.tolist() for result in site.results] == [[OK] * 6] * 2
    assert np.array_equal(site.host.read(site.ids), site.data)
    assert site.host.has_checksum.all()


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "disk", "is_direct"),
    [
        ("contiguous", "contiguous", True),
        ("aligned", "contiguous", True),
        ("contiguous", "aligned", True),
        ("aligned", "aligned", True),
        ("padded", "contiguous", True),  # the last block ends with the memory
        ("by head", "by head", True),
        ("by head", "contiguous", False),
        ("contiguous", "by head", False),
        ("by layer", "contiguous", False),
        ("by layer, block first", "contiguous", False),
    ],
)
@pytest.mark.parametrize("verifies", [True, False])
def test_bytes_arrive_whatever_the_layouts_are(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, host: str, disk: str, is_direct: bool, verifies: bool
) -> None:
    monkeypatch.setattr("kvbm.executor.copy_up._DIRECT_NBYTES", 3 * 288)
    site = make_site({"host": host, "disk": disk}, staging_blocks=4, verifies=verifies)
    wanted = site.fill("host")
    slots = np.random.default_rng(2).permutation(12)
    assert (site.run("host-disk", range(12), slots).outcomes == OK).all()
    site.fill("host", seed=2)
    site["host"].has_checksum[:] = True  # of what they held before
    kept = site.content("host")
    into: list[bool] = []
    submit = site["disk"].submit_read

    def look(ids: Any, memory: Any, rows: Any, **names: Any) -> Any:
        into.append(np.shares_memory(memory, site["host"].buffers[0]))
        assert memory.shape[1] == 4096 or not (into[-1] and host == "aligned"), "a whole slot needs no bounce"
        return submit(ids, memory, rows, **names)

    site["disk"].submit_read = look
    result = site.run("disk-host", slots[:7], [11, 0, 5, 6, 7, 1, 10], names=range(7))
    assert result.outcomes.tolist() == [OK] * 7, result.reason
    assert into == ([True] * 3 if is_direct else [False] * 4)
    assert np.array_equal(site.content("host", [11, 0, 5, 6, 7, 1, 10]), wanted[:7])
    others = [2, 3, 4, 8, 9]
    assert np.array_equal(site.content("host", others), kept[others])
    assert site["host"].has_checksum[[11, 0, 5, 6, 7, 1, 10]].tolist() == [verifies] * 7
    assert site["host"].has_checksum[others].all()
    if verifies and is_direct:
        assert site["host"].checksums[[11, 0, 5, 6, 7, 1, 10]].tolist() == site["disk"].checksums[slots[:7]].tolist()


# -- checksums -------------------------------------------------------------------------------------------------------


def test_checksums_are_kept_of_blocks_that_were_compared_and_of_no_others(
    make_keyed: MakeKeyed, chunks_of_four: None
) -> None:
    site = make_keyed(**SMALL)
    site.fill_store(12)
    site.spoil(2, 7)
    del site.store.objects[site.hashes[5].tobytes()]
    site.host.has_checksum[:] = True  # of what they held before
    site.host.checksums[:] = 12345
    result = site.up(10, destination_ids=BACKWARDS[:10])
    bad = [2, 5, 7]
    assert np.flatnonzero(result.outcomes != OK).tolist() == bad
    assert result.outcomes[bad].tolist() == [CORRUPT, FAILED, CORRUPT]
    assert result.reason == "checksum mismatch"
    good = np.setdiff1d(np.arange(10), bad)
    assert site.host.has_checksum[BACKWARDS[good]].all()
    assert not site.host.has_checksum[BACKWARDS[bad]].any()
    assert site.host.checksums[BACKWARDS[good]].tolist() == computed(site, BACKWARDS[good], site.hashes[good])
    assert site.host.has_checksum[:2].all(), "blocks that are not the job's stay as they are"
    assert site.host.checksums[:2].tolist() == [12345] * 2
    assert np.array_equal(site.host.read(BACKWARDS[good]), site.data[good])


@pytest.mark.parametrize("verifies", [True, False])
def test_flipped_bit_is_found_where_checksums_are_compared(make_keyed: MakeKeyed, verifies: bool) -> None:
    site = make_keyed(verifies=verifies, **SMALL)
    for name, data, checksum in zip(site.hashes, site.data, computed(site, site.ids, site.hashes), strict=True):
        site.store.objects[name.tobytes()] = data.tobytes(), checksum
    site.spoil(4)
    site.host.has_checksum[:] = True
    result = site.up(6)
    assert result.outcomes.tolist() == [OK] * 4 + [CORRUPT if verifies else OK, OK]
    assert result.reason == ("checksum mismatch" if verifies else "")
    assert site.host.has_checksum[:6].tolist() == ([True] * 4 + [False, True] if verifies else [False] * 6)
    assert site.host.has_checksum[6:].all()
    assert [ids for ids, _ in site.store.disowned] == ([[4]] if verifies else [])


def test_block_of_another_name_is_corrupt(make_site: MakeSite) -> None:
    site = make_site({"host": "contiguous", "disk": "contiguous"})
    site.fill("host")
    site.run("host-disk", [0, 1, 2], [0, 1, 2])
    result = site.run("disk-host", [0, 1, 2], [3, 4, 5], [0, 2, 1])
    assert result.outcomes.tolist() == [OK, CORRUPT, CORRUPT]
    assert site["host"].has_checksum[[3, 4, 5]].tolist() == [True, False, False]


# -- chunks that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refused", "failed", "absent"])
@pytest.mark.parametrize("is_away", [False, True])
def test_chunk_that_fails_costs_its_blocks_alone(
    make_keyed: MakeKeyed, chunks_of_four: None, how: str, is_away: bool
) -> None:
    """Those of a store that cannot be reached are late: they may be as good as ever."""
    site = make_keyed(**SMALL)
    site.fill_store(12)
    site.host.has_checksum[:] = True
    store = site.store

    def take(call: Any) -> Any:
        store.calls.append(call)
        store.is_away = False
        if len(store.calls) != 2:
            store.end(call)
        elif how == "failed":
            call.transfer.set_exception(StorageError("the client fell over"))
        elif how == "absent":
            call.transfer.set_result(np.zeros(4, dtype=np.bool_))
        store.is_away = is_away  # who asks for what was lost finds it so
        if len(store.calls) == 2 and how == "refused":
            raise MemoryError("no room for another batch")
        return call.transfer

    store._take = take  # type: ignore[method-assign]
    result = site.up(12)
    lost = LATE if is_away else FAILED
    assert result.outcomes.tolist() == [OK] * 4 + [lost] * 4 + [OK] * 4
    texts = {"refused": "no room for another batch", "failed": "the client fell over", "absent": "read error"}
    assert result.reason == texts[how]
    assert result.is_away is is_away
    assert site.host.has_checksum.tolist() == [True] * 4 + [how == "refused"] * 4 + [True] * 4
    assert store.disowned == []
    good = np.array([0, 1, 2, 3, 8, 9, 10, 11], dtype=np.int32)
    assert np.array_equal(site.host.read(good), site.data[good])


def test_comparison_that_fails_costs_its_chunk_alone(
    make_keyed: MakeKeyed, chunks_of_four: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_keyed(**SMALL)
    site.fill_store(12)
    means = site.executor._means
    compute, calls = means.compute_checksums, []

    def fail_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no thread")
        return compute(*arguments)

    monkeypatch.setattr(means, "compute_checksums", fail_second)
    result = site.up(12)
    assert result.outcomes.tolist() == [OK] * 4 + [FAILED] * 4 + [OK] * 4
    assert result.reason == "no thread"
    assert site.host.has_checksum.tolist() == [True] * 4 + [False] * 4 + [True] * 4
