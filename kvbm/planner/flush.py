"""Waiting for offloads: until all of them have ended, or until none touches one pool."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from kvbm.errors import TransferError, TransferTimeout
from kvbm.planner.dispatch import Dispatcher
from kvbm.planner.offload import OffloadRoute
from kvbm.pool import BlockPool
from kvbm.types import HashArray


class Flusher:
    """Waits for the offloads of a planner.

    Parameters
    ----------
    dispatcher : Dispatcher
    routes : sequence of OffloadRoute
    pump : callable
        Does what there is to do now.
    need_open : callable
        Raises `PoolClosed` once the planner is closed.
    clock : callable
        Gives seconds; monotonic.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        routes: Sequence[OffloadRoute],
        *,
        pump: Callable[[], bool],
        need_open: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher = dispatcher
        self._routes = tuple(routes)
        self._pump = pump
        self._need_open = need_open
        self._clock = clock

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything that was registered before has gone as far down as it goes, or was dropped.

        Raises
        ------
        TransferTimeout
            It takes longer; the work goes on.
        PoolClosed
            The planner is closed, or was closed meanwhile.
        TransferError
            Called in a callback of a transfer, in whose thread the offloads would have to end.
        """
        self._refuse_in_callbacks("flush")
        give_up = None if timeout_s is None else self._clock() + timeout_s
        for route in self._routes:
            with self._dispatcher.locked():
                self._need_open()
                route.collect(everything=True)
                seq = route.last_seq
            while True:
                self._pump()  # each settled job makes room for what still waits
                with self._dispatcher.locked():
                    if route.is_done(seq):
                        break
                    self._wait(route, give_up, timeout_s)

    @contextlib.contextmanager
    def calm(self, pool: BlockPool, timeout_s: float | None = None) -> Iterator[None]:
        """Keep offloads away from a pool while this is entered; what waited to leave it or to reach it is dropped.

        Raises
        ------
        TransferTimeout
            Offloads that touch it move for longer than that.
        PoolClosed
            The planner is closed, or was closed meanwhile.
        TransferError
            Called in a callback of a transfer.
        """
        self._refuse_in_callbacks("a reset")
        give_up = None if timeout_s is None else self._clock() + timeout_s
        near = [route for route in self._routes if pool in (route.source, route.destination)]
        with self._dispatcher.locked():
            self._need_open()
            for route in near:
                route.pauses += 1
        try:
            for route in near:
                with self._dispatcher.locked():
                    route.collect(everything=True)
                    route.drop_queue("reset")
                    while route.counters.in_flight:
                        self._wait(route, give_up, timeout_s)
            yield
        finally:
            with self._dispatcher.locked():
                for route in near:
                    route.pauses -= 1

    def wait_until_landed(self, pool: BlockPool, hashes: HashArray, timeout_s: float | None = None) -> None:
        """Wait until none of these blocks is on its way down to a pool.

        Raises
        ------
        TransferTimeout
            They move for longer than that.
        TransferError
            Called in a callback of a transfer.
        """
        self._refuse_in_callbacks("a reset")
        give_up = None if timeout_s is None else self._clock() + timeout_s
        for route in self._routes:
            if route.destination is pool:
                with self._dispatcher.locked():
                    while route.carries(hashes):
                        self._wait(route, give_up, timeout_s)

    def _refuse_in_callbacks(self, what: str) -> None:
        if self._dispatcher.is_answering:
            raise TransferError(f"{what} cannot wait in a callback of a transfer: call it from another thread")

    def _wait(self, route: OffloadRoute, give_up: float | None, timeout_s: float | None) -> None:
        """Wait, under the lock, until some job is settled."""
        self._need_open()
        remaining_s = None if give_up is None else give_up - self._clock()
        if remaining_s is not None and remaining_s <= 0:
            names = " to ".join(tier.value for tier in route.key)
            raise TransferTimeout(f"offloads from {names} did not end within {timeout_s} s; they go on")
        if len(self._dispatcher.ledger):
            limit = threading.TIMEOUT_MAX if remaining_s is None else min(remaining_s, threading.TIMEOUT_MAX)
            self._dispatcher.changed.wait(limit)
