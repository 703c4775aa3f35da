"""Open jobs of several ranks: the worst answer counts, the dead count as failed, strays are ignored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvbm.jobs import CopyJob, InventoryJob, JobResult, Outcome
from kvbm.planner.ledger import Ledger, OpenJob
from kvbm.types import Tier

OK, LATE, FAILED, CORRUPT = Outcome.OK, Outcome.LATE, Outcome.FAILED, Outcome.CORRUPT


def settle(entry: OpenJob) -> Any:
    return ()


def copy_job(job_id: int, num_blocks: int = 4) -> CopyJob:
    ids = np.arange(num_blocks, dtype=np.int32)
    return CopyJob(
        job_id=job_id, source=Tier.DEVICE, destination=Tier.HOST, source_ids=ids, destination_ids=ids,
        hashes=np.zeros((num_blocks, 2), dtype=np.uint64),
    )  # fmt: skip


def result(job_id: int, *outcomes: int, **fields: Any) -> JobResult:
    return JobResult(job_id=job_id, outcomes=np.array(outcomes, dtype=np.uint8), **fields)


def opened(ledger: Ledger, ranks: Any = (0, 1), *, num_blocks: int = 4, now: float = 0.0) -> tuple[int, OpenJob]:
    job_id = ledger.next_id()
    return job_id, ledger.open(copy_job(job_id, num_blocks), ranks, settle, now=now, timeout_s=10.0)


def test_numbers_of_jobs_are_never_given_twice() -> None:
    ledger = Ledger()
    assert len({ledger.next_id() for _ in range(100)}) == 100


def test_job_of_one_rank_is_settled_by_its_answer() -> None:
    ledger = Ledger()
    job_id, entry = opened(ledger, [0])
    assert len(ledger) == 1
    assert ledger.answer(0, result(job_id, OK, LATE, FAILED, CORRUPT, reason="bad disk", seconds=2.0)) is entry
    assert len(ledger) == 0
    assert entry.outcomes.tolist() == [OK, LATE, FAILED, CORRUPT]
    assert entry.ok.tolist() == [True, False, False, False]
    assert (entry.label, entry.reason, entry.seconds) == ("corrupt", "bad disk", 2.0)


def test_worst_answer_of_the_ranks_counts_for_each_block_in_any_order() -> None:
    first, second = (OK, OK, FAILED, CORRUPT), (OK, LATE, LATE, FAILED)
    for ranks in ((0, 1), (1, 0)):
        ledger = Ledger()
        job_id, entry = opened(ledger)
        assert ledger.answer(ranks[0], result(job_id, *first, reason="one", seconds=1.0)) is None
        assert len(ledger) == 1, "the other has not said"
        assert ledger.answer(ranks[1], result(job_id, *second, reason="two", seconds=3.0)) is entry
        assert entry.outcomes.tolist() == [OK, LATE, FAILED, CORRUPT]
        assert entry.reason == "one, two"
        assert entry.seconds == 3.0
        assert set(entry.results) == {0, 1}


def test_equal_reasons_are_told_once() -> None:
    ledger = Ledger()
    job_id, entry = opened(ledger)
    for rank in (0, 1):
        ledger.answer(rank, result(job_id, *[FAILED] * 4, reason="disk full"))
    assert entry.reason == "disk full"


def test_bytes_are_those_of_blocks_that_all_ranks_have() -> None:
    ledger = Ledger()
    job_id, entry = opened(ledger)
    ledger.answer(0, result(job_id, OK, OK, OK, OK, nbytes=400))
    ledger.answer(1, result(job_id, OK, FAILED, FAILED, FAILED, nbytes=100))
    assert entry.nbytes == 200


def test_strays_are_ignored_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    job_id, entry = opened(ledger)
    assert ledger.answer(0, result(job_id, OK, OK, OK, OK)) is None
    assert ledger.answer(0, result(job_id, *[CORRUPT] * 4)) is None, "it has said already"
    assert ledger.answer(7, result(job_id, *[CORRUPT] * 4)) is None, "nobody asked it"
    assert ledger.answer(0, result(999, OK)) is None, "there is no such job"
    assert entry.outcomes.tolist() == [OK] * 4
    assert ledger.answer(1, result(job_id, OK, OK, OK, OK)) is entry
    assert ledger.answer(1, result(job_id, OK, OK, OK, OK)) is None, "it is settled"
    assert len(caplog.records) == 4
    assert caplog.records[0].getMessage() == f"answer to no open job rank=0 job_id={job_id}"


@pytest.mark.parametrize("outcomes", [(), (OK,), (OK,) * 5])
def test_answer_for_another_number_of_blocks_fails_all(outcomes: tuple[int, ...]) -> None:
    ledger = Ledger()
    job_id, entry = opened(ledger)
    ledger.answer(0, result(job_id, OK, OK, OK, CORRUPT))
    assert ledger.answer(1, result(job_id, *outcomes)) is entry
    assert entry.outcomes.tolist() == [FAILED, FAILED, FAILED, CORRUPT]
    assert entry.reason == f"rank 1 answered for {len(outcomes)} of 4 blocks"


def test_lost_rank_fails_what_it_had_not_answered_and_settles_what_waited_for_nobody_else() -> None:
    ledger = Ledger()
    answered, by_other = opened(ledger)
    ledger.answer(0, result(answered, OK, OK, OK, CORRUPT))
    _, open_for_both = opened(ledger)
    said, by_lost = opened(ledger)
    ledger.answer(1, result(said, OK, OK, OK, OK))
    _, alone = opened(ledger, [1], num_blocks=1)
    _, elsewhere = opened(ledger, [0])
    assert ledger.lose(1, "killed") == [by_other, alone]
    assert by_other.outcomes.tolist() == [FAILED, FAILED, FAILED, CORRUPT]
    assert by_other.reason == "executor 1 is lost: killed"
    assert open_for_both.outcomes.tolist() == [FAILED] * 4
    assert (by_lost.outcomes.tolist(), elsewhere.outcomes.tolist()) == ([OK] * 4, [OK] * 4)
    assert len(ledger) == 3
    assert ledger.lose(1, "again") == []
    assert ledger.answer(1, result(open_for_both.job.job_id, OK, OK, OK, OK)) is None, "the dead do not speak"
    assert ledger.answer(0, result(open_for_both.job.job_id, OK, OK, OK, OK)) is open_for_both
    assert open_for_both.outcomes.tolist() == [FAILED] * 4
    assert ledger.lose(0, "killed too") == [by_lost, elsewhere]
    assert len(ledger) == 0


def test_jobs_are_overdue_once_and_stay_open() -> None:
    ledger = Ledger()
    assert ledger.next_due_at() is None
    first_id, first = opened(ledger, now=0.0)
    _, second = opened(ledger, now=5.0)
    assert ledger.next_due_at() == 10.0
    assert ledger.overdue(9.99) == []
    assert ledger.overdue(10.0) == [first]
    assert first.is_draining
    assert ledger.next_due_at() == 15.0
    assert ledger.overdue(20.0) == [second]
    assert ledger.overdue(30.0) == []
    assert ledger.next_due_at() is None
    assert len(ledger) == 2
    for rank in (0, 1):
        ledger.answer(rank, result(first_id, OK, OK, OK, OK))
    assert first.ok.all(), "late for its waiter, good all the same"


def test_inventory_has_no_blocks_to_fail() -> None:
    ledger = Ledger()
    entry = ledger.open(InventoryJob(job_id=3, tier=Tier.DISK), [0, 1], settle, now=0.0, timeout_s=1.0)
    ledger.answer(0, result(3, ids=np.zeros(1, dtype=np.int32)))
    assert ledger.lose(1, "killed") == [entry]
    assert (entry.label, entry.reason) == ("ok", "executor 1 is lost: killed")
    assert set(entry.results) == {0}
