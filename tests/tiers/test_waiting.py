"""Waiting for what moves: in asyncio, and interrupted by ctrl-C (CONFORMANCE 32)."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tier_site import PATIENCE_S, Site, names

from kvbm.errors import TransferCancelled
from kvbm.types import HashArray

# -- asyncio ---------------------------------------------------------------------------------------------------


def test_onboards_are_awaited_side_by_side(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=16, disk=32)
    prompts = [names(3) for _ in range(4)]
    for prompt in prompts:
        tiers.put_below(prompt, "disk")
    gate = make_tiers.gate(tiers, "disk-device")

    async def serve(prompt: HashArray) -> int:
        with await tiers.manager.onboard(tiers.manager.match_sequence_hashes(prompt)) as blocks:
            tiers.see_right(blocks, prompt)
            return len(blocks)

    async def run() -> list[int]:
        tasks = [asyncio.ensure_future(serve(prompt)) for prompt in prompts]
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        gate.open()
        return await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)

    assert asyncio.run(run()) == [3] * 4
    tiers.see_idle()


def test_task_that_is_cancelled_leaves_its_onboard_to_the_caller(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=16, disk=32)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")

    async def run() -> Any:
        transfer = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))

        async def wait() -> Any:
            return await transfer

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return transfer

    transfer = asyncio.run(run())
    assert transfer.cancel()
    gate.open()
    with pytest.raises(TransferCancelled):
        transfer.result(0)
    tiers.see_idle()


def test_awaited_onboard_ends_at_its_deadline(make_tiers: Site) -> None:
    tiers = make_tiers(device=16, host=16, disk=32)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")

    async def run() -> int:
        with await tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes), timeout=0.02) as blocks:
            return len(blocks)

    assert asyncio.run(run()) == 0
    gate.open()
    tiers.see_idle()


# -- ctrl-C ----------------------------------------------------------------------------------------------------


_WAITS = ("wait", "wait_for", "join", "_wait_for_tstate_lock")  # of the module threading


@contextmanager
def interrupted_once() -> Iterator[None]:
    """Send this thread what ctrl-C sends, once it waits; it hears of it once."""
    main, has_begun, is_over = threading.get_ident(), threading.Event(), threading.Event()

    def is_waiting() -> bool:
        code = sys._current_frames()[main].f_code
        return has_begun.is_set() and code.co_filename == threading.__file__ and code.co_name in _WAITS

    def hear(*_: Any) -> None:
        if not is_over.is_set():
            is_over.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        while not is_waiting() and not is_over.is_set():
            pass
        while not is_over.is_set():  # a signal that comes just before the thread sleeps does not wake it
            signal.pthread_kill(main, signal.SIGINT)
            is_over.wait(0.01)

    before = signal.signal(signal.SIGINT, hear)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        has_begun.set()
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        is_over.set()
        thread.join(PATIENCE_S)
        signal.signal(signal.SIGINT, before)


def test_interrupt_while_waiting_for_an_onboard_leaves_all_usable(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    hashes = names(3)
    tiers.put_below(hashes, "disk")
    gate = make_tiers.gate(tiers, "disk-device")
    transfer: Any = tiers.manager.onboard(tiers.manager.match_sequence_hashes(hashes))
    with interrupted_once():
        transfer.result(PATIENCE_S)
    assert not transfer.done()
    gate.open()
    with transfer.result(PATIENCE_S) as blocks:
        tiers.see_right(blocks, hashes)
        assert len(blocks) == 3
    tiers.see_idle()


def test_interrupt_while_flushing_leaves_all_usable(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    gate = make_tiers.gate(tiers, "host-disk")
    hashes = names(3)
    tiers.put(hashes)
    gate.wait_for(1)
    with interrupted_once():
        tiers.manager.flush(PATIENCE_S)
    gate.open()
    tiers.manager.flush(PATIENCE_S)
    assert tiers.lies("disk", hashes) == [True] * 3
    tiers.see_idle()


def test_interrupt_while_closing_is_made_good_by_closing_again(make_tiers: Site) -> None:
    tiers = make_tiers(device=8, host=8, disk=16)
    gate = make_tiers.gate(tiers, "host-disk")
    tiers.put(names(3))
    gate.wait_for(1)
    with interrupted_once():
        tiers.manager.close(PATIENCE_S)
    gate.open()
    tiers.manager.close()
    tiers.settle()
