"""Native disk queues: bytes, order, cancelling and closing, with threads and with a ring."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from disk_native import NUM_PAGES, PAGE, PATIENCE_S, aligned, content, disk_io, pages, wait_for

from kvbm.errors import PoolClosed

pytestmark = pytest.mark.skipif(disk_io is None, reason="the native twin has no disk queues here")


def test_batches_move_their_bytes_and_say_how_many(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(), aligned(NUM_PAGES, PAGE)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.shape, dtype=np.uint8)
    order = np.random.default_rng(2).permutation(NUM_PAGES)
    queue.submit(7, False, *pages(memory, order, np.arange(NUM_PAGES)))
    ((token, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (token, errnos.dtype, moved.dtype, num_calls) == (7, np.int32, np.int64, NUM_PAGES)
    assert not errnos.any()
    assert (moved == PAGE).all()
    assert np.array_equal(content(fd)[order], memory)
    back = aligned(NUM_PAGES, PAGE)
    queue.submit(8, True, *pages(back, order, np.arange(NUM_PAGES)))
    wait_for(queue, 1)
    assert np.array_equal(back, memory)


def test_one_operation_takes_many_buffers(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(), aligned(8, PAGE)
    memory[:] = np.arange(8, dtype=np.uint8)[:, None]
    rows = np.array([5, 1, 2, 7, 0])
    addresses = (memory.ctypes.data + rows * PAGE).astype(np.uint64)
    lengths = np.array([1, 2, 1, 1, 1], dtype=np.uint64) * np.uint64(PAGE)
    queue.submit(1, False, np.array([2, 20]) * PAGE, np.array([3, 2]), addresses, lengths, memory)
    ((_, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (errnos.tolist(), moved.tolist(), num_calls) == ([0, 0], [4 * PAGE, 2 * PAGE], 2)
    assert content(fd)[[2, 3, 4, 5, 20, 21], 0].tolist() == [5, 1, 2, 2, 7, 0]


def test_empty_batch_ends_at_once(make_queue: Any) -> None:
    queue, memory = make_queue(), aligned(1, PAGE)
    queue.submit(1, True, *pages(memory, [], []))
    ((token, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (token, len(errnos), len(moved), num_calls) == (1, 0, 0, 0)


def test_reads_go_before_writes_that_wait(make_queue: Any) -> None:
    queue, memory = make_queue(depth=1), aligned(8, PAGE)
    queue.pause()
    for token, is_read in enumerate([False, False, True, True], start=1):
        queue.submit(token, is_read, *pages(memory, [token], [token]))
    assert queue.num_waiting == 4
    assert queue.last_token == 4
    queue.resume()
    assert [answer[0] for answer in wait_for(queue, 4)] == [3, 4, 1, 2]


def test_writes_do_not_wait_for_ever_behind_reads(make_queue: Any) -> None:
    queue, memory = make_queue(depth=1), aligned(64, PAGE)
    queue.pause()
    queue.submit(1, False, *pages(memory, [63], [63]))
    for token in range(2, 42):
        queue.submit(token, True, *pages(memory, [token], [token]))
    queue.resume()
    assert [answer[0] for answer in wait_for(queue, 41)].index(1) == 16


def test_wait_sleeps_and_gives_up_when_told(make_queue: Any) -> None:
    queue, memory = make_queue(), aligned(1, PAGE)
    queue.pause()
    queue.submit(1, True, *pages(memory, [0], [0]))
    begin, cpu = time.monotonic(), time.process_time()
    assert queue.wait(0.3) == []
    assert time.monotonic() - begin >= 0.3
    assert time.process_time() - cpu < 0.15, "somebody is busy where nothing is to be done"
    queue.resume()
    wait_for(queue, 1)


def test_cancelled_batch_ends_at_once_and_moves_nothing(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(), aligned(2, PAGE)
    memory[:] = 9
    queue.pause()
    queue.submit(1, False, *pages(memory, [0], [0]))
    queue.submit(2, False, *pages(memory, [1, 2], [0, 1]))
    assert queue.cancel(2)
    ((token, errnos, moved, num_calls),) = wait_for(queue, 1)
    assert (token, errnos.tolist(), moved.tolist(), num_calls) == (2, [errno.ECANCELED] * 2, [0, 0], 0)
    assert not queue.cancel(2)
    assert not queue.cancel(77)
    queue.resume()
    assert wait_for(queue, 1)[0][0] == 1
    assert content(fd)[:3, 0].tolist() == [9, 0, 0]


def test_cancelling_drops_only_what_has_not_begun(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(depth=2), aligned(NUM_PAGES, PAGE)
    memory[:] = 9
    for token in range(1, 21):
        queue.submit(token, False, *pages(memory, range(NUM_PAGES), range(NUM_PAGES)))
        queue.cancel(token)
        ((_, errnos, moved, _),) = wait_for(queue, 1)
        is_dropped = errnos == errno.ECANCELED
        assert not errnos[~is_dropped].any()
        assert (np.diff(is_dropped.astype(int)) >= 0).all(), "operations begin in their order"
        assert (moved == np.where(is_dropped, 0, PAGE)).all()
        data = content(fd)
        assert (data[~is_dropped] == 9).all()
        os.pwritev(fd, [aligned(NUM_PAGES, PAGE)], 0)


def test_close_lets_queued_work_end(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(depth=2), aligned(NUM_PAGES, PAGE)
    memory[:] = 5
    queue.pause()
    for token in range(1, 9):
        queue.submit(token, False, *pages(memory, np.arange(8) + 8 * (token - 1), np.arange(8)))
    queue.close()
    queue.close()
    with pytest.raises(PoolClosed, match="DiskQueue is closed"):
        queue.submit(9, True, *pages(memory, [0], [0]))
    queue.resume()
    assert sorted(answer[0] for answer in wait_for(queue, 8)) == list(range(1, 9))
    assert queue.wait(PATIENCE_S) is None
    assert queue.wait(PATIENCE_S) is None
    assert (content(fd) == 5).all()


def test_close_wakes_who_waits(make_queue: Any) -> None:
    queue = make_queue()
    answers: list[Any] = []
    waiter = threading.Thread(target=lambda: answers.append(queue.wait(PATIENCE_S)))
    waiter.start()
    queue.close()
    waiter.join(PATIENCE_S)
    assert answers == [None]


def test_batch_that_was_given_may_go_again_while_closing(make_queue: Any, fd: int) -> None:
    queue, memory = make_queue(), aligned(1, PAGE)
    memory[:] = 3
    queue.submit(1, False, *pages(memory, [0], [0]))
    wait_for(queue, 1)
    queue.close()
    with pytest.raises(PoolClosed):
        queue.submit(1, False, *pages(memory, [1], [0]))
    queue.submit(1, False, *pages(memory, [1], [0]), is_again=True)
    wait_for(queue, 1)
    assert queue.wait(PATIENCE_S) is None
    with pytest.raises(PoolClosed):
        queue.submit(1, False, *pages(memory, [2], [0]), is_again=True)
    assert content(fd)[:3, 0].tolist() == [3, 3, 0]


def test_many_threads_submit_while_one_waits(make_queue: Any) -> None:
    queue, num_each, num_threads = make_queue(depth=8), 40, 4
    memory = aligned(num_threads * num_each, PAGE)
    memory[:] = np.arange(len(memory), dtype=np.int64)[:, None] % 251
    expected = memory.copy()

    def submit(thread: int) -> None:
        for i in range(num_each):
            row = thread * num_each + i
            queue.submit(row + 1, False, *pages(memory, [1 + row % 63], [row]))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    answers = wait_for(queue, num_threads * num_each)
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(answer[0] for answer in answers) == list(range(1, num_threads * num_each + 1))
    assert not any(answer[1].any() for answer in answers)
    assert np.array_equal(memory, expected)


def test_memory_lives_until_its_batch_has_ended(make_queue: Any) -> None:
    queue, memory = make_queue(), aligned(1, PAGE)
    held = weakref.ref(memory)
    queue.pause()
    queue.submit(1, True, *pages(memory, [0], [0]))
    del memory
    assert held() is not None
    queue.resume()
    wait_for(queue, 1)
    assert held() is None


def test_dropped_queue_waits_for_what_moves_and_forgets_the_rest(make_queue: Any, fd: int) -> None:
    for num_batches in (0, 1, 50):
        queue, memory = make_queue(depth=2), aligned(NUM_PAGES, PAGE)
        memory[:] = 7
        held = weakref.ref(memory)
        for token in range(1, num_batches + 1):
            queue.submit(token, False, *pages(memory, range(NUM_PAGES), range(NUM_PAGES)))
        del memory, queue
        assert held() is None
    data = content(fd)
    os.pwritev(fd, [aligned(NUM_PAGES, PAGE)], 0)
    assert not content(fd).any(), "nothing of it is written any more"
    assert set(np.unique(data)) <= {0, 7}


def test_last_token_stays_when_an_older_batch_goes_again(make_queue: Any) -> None:
    """By it an engine tells, after an interrupt, whether the queue got its batch."""
    queue, memory = make_queue(), aligned(1, PAGE)
    queue.submit(3, True, *pages(memory, [0], [0]))
    wait_for(queue, 1)
    queue.submit(5, True, *pages(memory, [1], [0]))
    queue.submit(3, True, *pages(memory, [2], [0]), is_again=True)
    assert queue.last_token == 5
    wait_for(queue, 2)
