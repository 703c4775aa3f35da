"""Copies between the host tier and an engine's own memory: bytes, books, and what an engine may reuse when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_site import POISON, ForeignSite, names, slots_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tier_site import content_of

from kvbm._backend import Backend
from kvbm.errors import ConfigError, HashFormatError, NotEnoughBlocksAvailable, PoolClosed, TransferTimeout
from kvbm.jobs import CopyJob, Outcome, TransferState
from kvbm.planner import Limits, Planner
from kvbm.pool import BlockPool
from kvbm.types import Tier

MakeSite = Callable[..., ForeignSite]


@pytest.fixture
def make_site(backend: Backend, tmp_path: Path) -> Iterator[MakeSite]:
    sites: list[ForeignSite] = []

    def make(**settings: Any) -> ForeignSite:
        folder = tmp_path / str(len(sites))
        folder.mkdir()
        sites.append(ForeignSite(backend, folder, **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site: MakeSite) -> ForeignSite:
    return make_site()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_an_engine_saved_comes_back_into_other_slots(make_site: MakeSite, num_ranks: int) -> None:
    site = make_site(num_ranks=num_ranks)
    chain = names(5)
    assert site.save(chain, slots_of(9, 2, 14, 0, 7)).result(0).tolist() == [True] * 5
    site.wipe(np.arange(16, dtype=np.int32))
    assert site.load(chain, slots_of(1, 3, 5, 11, 13)).result(0).all()
    assert site.holds(slots_of(1, 3, 5, 11, 13), chain).all()
    site.calm()


def test_blocks_that_only_the_disk_has_come_back_too(site: ForeignSite) -> None:
    chain = names(6)
    site.save(chain, slots_of(0, 1, 2, 3, 4, 5))
    site.pools[0].reset()
    site.wipe(np.arange(16, dtype=np.int32))
    assert site.load(chain, slots_of(10, 9, 8, 7, 6, 5)).result(0).all()
    assert site.holds(slots_of(10, 9, 8, 7, 6, 5), chain).all()
    site.calm()


def test_what_is_forgotten_on_its_way_may_be_saved_again_at_once(site: ForeignSite) -> None:
    chain = names(4)
    first = site.save(chain, slots_of(0, 1, 2, 3), is_stepped=False)
    assert site.planner.forgetter.forget_all()
    assert not site.foreign.is_saving(chain).any()
    again = site.save(chain, slots_of(4, 5, 6, 7), is_stepped=False)
    assert site.foreign.is_saving(chain).all()
    site.step_all()
    assert first.result(0).tolist() == [False] * 4
    assert again.result(0).tolist() == [True] * 4
    assert not site.foreign.is_saving(chain).any()
    assert (site.pools[0].lookup(chain) >= 0).all()
    site.calm()


def test_what_is_there_or_on_its_way_is_not_copied_again(site: ForeignSite) -> None:
    chain = names(4)
    first = site.save(chain, slots_of(0, 1, 2, 3), is_stepped=False)
    again = site.foreign.save(slots_of(0, 1, 2, 3), chain, chain)
    assert again.result(0).tolist() == [False] * 4, "it is on its way"
    assert site.foreign.is_saving(chain).all()
    site.step_all()
    assert first.result(0).all()
    assert not site.foreign.is_saving(chain).any()
    more = np.concatenate([chain, names(1)])
    assert site.save(more, slots_of(0, 1, 2, 3, 4)).result(0).tolist() == [False] * 4 + [True]
    assert site.planner.statistics().routes[Tier.DEVICE, Tier.HOST].present == 8
    site.calm()


def test_the_leading_blocks_are_saved_where_not_all_have_room(make_site: MakeSite) -> None:
    site = make_site(host=4)
    chain = names(6)
    assert site.save(chain, slots_of(0, 1, 2, 3, 4, 5)).result(0).tolist() == [True] * 4 + [False] * 2
    assert site.planner.statistics().routes[Tier.DEVICE, Tier.HOST].dropped["no_room"] == 2
    site.calm()


def test_saves_hold_a_share_of_the_pool_at_most(make_site: MakeSite) -> None:
    site = make_site(host=12, limits=Limits(in_flight_share=0.25))
    one, two = names(2), names(2)
    site.save(one, slots_of(0, 1), is_stepped=False)
    saved = site.save(two, slots_of(2, 3), is_stepped=False)
    site.step_all()
    assert saved.result(0).tolist() == [True, False]
    site.calm()


def test_a_long_request_is_cut_into_jobs_and_ends_once(make_site: MakeSite) -> None:
    site = make_site(limits=Limits(job_blocks=3, in_flight_share=1.0))
    chain, slots = names(8), np.arange(8, dtype=np.int32)
    ended: list[Any] = []
    saved = site.save(chain, slots, is_stepped=False)
    saved.add_done_callback(ended.append)
    assert [len(job.hashes) for job in site.channels[0].waiting if isinstance(job, CopyJob)] == [3, 3, 2]
    site.channels[0].step(1)
    assert not saved.done()
    site.step_all()
    assert saved.result(0).all()
    loaded = site.load(chain, slots, is_stepped=False)
    assert [len(job.hashes) for job in site.channels[0].waiting if isinstance(job, CopyJob)] == [3, 3, 2]
    site.step_all()
    assert loaded.result(0).all()
    assert ended == [saved]
    site.calm()


def test_a_flipped_bit_is_a_miss_and_the_copy_is_dropped(site: ForeignSite) -> None:
    chain = names(3)
    site.save(chain, slots_of(0, 1, 2))
    memory = site.ranks[0][Tier.HOST]
    bad = int(site.pools[0].lookup(chain)[1])
    data = memory.read(slots_of(bad))
    checksum = memory.checksums[bad]
    data[0, 17] ^= 4
    memory.write(slots_of(bad), data)
    memory.checksums[bad], memory.has_checksum[bad] = checksum, True
    assert site.load(chain, slots_of(5, 6, 7)).result(0).tolist() == [True, False, True]
    assert (site.pools[0].lookup(chain) >= 0).tolist() == [True, False, True]
    assert site.planner.statistics().mismatches["host"] == 1
    assert site.load(chain, slots_of(5, 6, 7)).result(0).all(), "the disk has a good one"
    assert site.holds(slots_of(5, 6, 7), chain).all()
    site.calm()


@pytest.mark.parametrize("outcome", [Outcome.LATE, Outcome.FAILED])
def test_a_copy_that_did_not_come_costs_its_blocks_alone(site: ForeignSite, outcome: Outcome) -> None:
    chain = names(2)
    saved = site.save(chain, slots_of(0, 1), is_stepped=False)
    site.channels[0].answer(0, outcome)
    assert not saved.result(0).any()
    site.calm()
    site.save(chain, slots_of(0, 1))
    loaded = site.load(chain, slots_of(3, 4), is_stepped=False)
    site.channels[0].answer(0, outcome)
    assert not loaded.result(0).any()
    assert (site.pools[0].lookup(chain) >= 0).all(), "the copies may be good"
    site.calm()


def test_a_late_copy_holds_its_blocks_until_it_has_landed(site: ForeignSite) -> None:
    chain = names(2)
    saved = site.save(chain, slots_of(0, 1), is_stepped=False, timeout_s=5.0)
    site.now = 6.0
    assert saved.state is TransferState.TIMED_OUT
    assert saved.is_draining, "the engine must leave the slots alone"
    with pytest.raises(TransferTimeout):
        saved.result(0)
    site.step_all()
    assert not saved.is_draining
    assert (site.pools[0].lookup(chain) >= 0).all(), "it came after all"
    site.calm()


def test_closing_ends_what_is_open_and_what_comes_later_is_let_go(site: ForeignSite) -> None:
    chain = names(2)
    saved = site.save(chain, slots_of(0, 1), is_stepped=False)
    site.planner.close(0.0)
    assert isinstance(saved.exception(0), PoolClosed)
    assert saved.is_draining
    site.channels[0].step_all()
    assert not saved.is_draining
    with pytest.raises(PoolClosed):
        site.foreign.save(slots_of(0), chain[:1], chain[:1])


def test_nothing_is_moved_for_nothing(site: ForeignSite) -> None:
    none = slots_of()
    assert site.foreign.save(none, names(0), names(0)).result(0).tolist() == []
    assert site.load(names(3), slots_of(0, 1, 2)).result(0).tolist() == []
    assert not site.channels[0].waiting
    site.calm()


def test_bad_input_says_so_and_takes_nothing(site: ForeignSite, backend: Backend) -> None:
    chain = names(2)
    site.save(chain, slots_of(0, 1))
    blocks = site.pools[0].match_sequence_hashes(chain)
    with pytest.raises(HashFormatError, match="slots has 1 entries, need 2"):
        site.foreign.load(blocks, slots_of(0))
    assert len(blocks) == 2, "the guard is still the caller's"
    blocks.release()
    with pytest.raises(HashFormatError):
        site.foreign.save(slots_of(0, 1), chain[:1], chain[:1])
    pool = BlockPool(2, tier=Tier.HOST, backend=backend)
    with pytest.raises(ConfigError, match="another tier"):
        Planner([pool], site.channels, foreign_tier=Tier.HOST)
    with pytest.raises(ConfigError, match="channel"):
        Planner([pool], foreign_tier=Tier.DEVICE)
    site.calm()


def test_loading_counts_the_way_into_the_engine(site: ForeignSite) -> None:
    chain = names(4)
    site.save(chain, slots_of(0, 1, 2, 3))
    site.load(chain, slots_of(0, 1, 2, 3))
    assert (Tier.HOST, Tier.DEVICE) in site.planner.estimates.routes()
    hit = site.planner.match(chain)
    fast = site.planner.advisor.advise(hit, 1.0, block_tokens=4, block_nbytes=288)
    assert fast.num_blocks == 4
    slow = site.planner.advisor.advise(hit, 1e12, block_tokens=4, block_nbytes=288)
    assert slow.num_blocks == 0, "also from memory it takes some time"
    hit.release()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_schedule_gives_an_engine_a_wrong_byte(make_site: MakeSite, data: st.DataObject) -> None:
    """The engine does with its slots what engines do: it reuses them once a copy has landed."""
    site = make_site(slots=12, host=5, disk=9, limits=Limits(job_blocks=2, in_flight_share=1.0))
    chains = [names(4) for _ in range(3)]
    busy: list[tuple[str, Any, Any, Any]] = []  # verb, transfer, slots, chain
    free = set(range(12))
    for _ in range(data.draw(st.integers(1, 25))):
        verb = data.draw(st.sampled_from(["save", "load", "step", "answer", "pump", "reap"]))
        if verb in ("save", "load") and len(free) >= 4:
            chain = data.draw(st.sampled_from(chains))[: data.draw(st.integers(1, 4))]
            slots = slots_of(*sorted(free)[: len(chain)])
            free -= set(slots.tolist())
            if verb == "save":
                busy.append((verb, site.save(chain, slots, is_stepped=False), slots, chain))
            else:
                site.wipe(slots)
                hit = site.planner.match(chain)
                try:
                    staged = site.planner.onboard(hit)
                except NotEnoughBlocksAvailable:  # saves hold the host tier
                    free |= set(slots.tolist())
                    continue
                while not staged.done():
                    site.channels[0].step()
                blocks = staged.result(0)
                num_blocks = len(blocks)
                busy.append((verb, site.foreign.load(blocks, slots[:num_blocks]), slots, chain[:num_blocks]))
        elif verb == "step" and site.channels[0].waiting:
            site.channels[0].step(data.draw(st.integers(0, len(site.channels[0].waiting) - 1)))
        elif verb == "answer" and site.channels[0].waiting:
            index = data.draw(st.integers(0, len(site.channels[0].waiting) - 1))
            site.channels[0].answer(index, data.draw(st.sampled_from([Outcome.LATE, Outcome.FAILED])))
        elif verb == "pump":
            site.planner.pump()
        elif verb == "reap":
            for entry in [entry for entry in busy if entry[1].done() and not entry[1].is_draining]:
                busy.remove(entry)
                _see(site, entry)
                site.wipe(entry[2])  # the next request's
                free |= set(entry[2].tolist())
    site.step_all()
    for entry in busy:
        _see(site, entry)
    site.calm()


def _see(site: ForeignSite, entry: tuple[str, Any, Any, Any]) -> None:
    verb, transfer, slots, chain = entry
    good = transfer.result(0)
    if verb == "load":
        right = site.holds(slots[: len(chain)], chain)
        assert right[good].all(), "what is said to be good is"
        data = site.ranks[0][Tier.DEVICE].read(slots[: len(chain)])
        untouched = (data == POISON).all(axis=1)
        assert (right | untouched)[~good].all() or not good.all()
    else:
        assert np.array_equal(site.ranks[0][Tier.DEVICE].read(slots), content_of(chain))
