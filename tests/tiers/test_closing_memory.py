"""Memory whose bytes move stays until they have moved, though its storage is closed meanwhile (CONFORMANCE 32)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tier_site import BLOCK_NBYTES, disk_layout, names

from kvbm._backend import Backend
from kvbm.storage import HostStorage
from kvbm.transfer import TransferEngine

IDS = np.arange(4, dtype=np.int32)


class Closing:
    """Storages that another thread closes just before bytes move."""

    def __init__(self, backend: Backend) -> None:
        self.is_armed = False
        self.num_closed = 0
        self.backend = replace(
            backend,
            copy_blocks=self._before(backend.copy_blocks),
            checksum_blocks=self._before(backend.checksum_blocks),
        )
        self.storages = [HostStorage(disk_layout(4), backend=self.backend) for _ in range(2)]
        self.memory = [weakref.ref(storage.buffers[0]) for storage in self.storages]

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def closing(*arguments: Any, **settings: Any) -> Any:
            if self.is_armed:
                for storage in self.storages:
                    storage.close()
                gc.collect()
                self.num_closed += 1
                assert all(ref() is not None for ref in self.users), "its memory is gone"
            return call(*arguments, **settings)

        return closing

    def arm(self, num_users: int) -> None:
        """Close from now on; the first storages must keep their memory meanwhile."""
        self.users = self.memory[:num_users]
        self.is_armed = True


@pytest.fixture
def closing(backend: Backend) -> Closing:
    return Closing(backend)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_host_memory_stays_while_it_is_read_or_written(closing: Closing, verb: str) -> None:
    storage = closing.storages[0]
    data = np.full((4, BLOCK_NBYTES), 7, dtype=np.uint8)
    storage.write(IDS, data)
    closing.arm(1)
    if verb == "read":
        np.testing.assert_array_equal(storage.read(IDS), data)
    else:
        storage.write(IDS, data)
    assert closing.num_closed == 1
    assert closing.memory[0]() is None  # and goes then


def test_host_memory_stays_while_its_checksums_are_computed(closing: Closing) -> None:
    storage, hashes = closing.storages[0], names(4)
    with TransferEngine(num_threads=1, backend=closing.backend) as engine:
        before = engine.compute_checksums(storage, IDS, hashes)
        closing.arm(1)
        assert engine.compute_checksums(storage, IDS, hashes).tolist() == before.tolist()
    assert closing.num_closed == 1


def test_host_memory_stays_while_it_is_copied(closing: Closing) -> None:
    source, destination = closing.storages
    with TransferEngine(num_threads=1, backend=closing.backend) as engine:
        closing.arm(2)
        assert engine.copy(source, destination, IDS, IDS, hashes=names(4)).result().good.all()
    assert closing.num_closed == 1


def test_host_memory_that_is_closed_while_its_copy_is_planned_stays(
    closing: Closing, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = closing.storages

    def plan(*arguments: Any) -> Any:
        from kvbm.copyplan import plan_copy

        planned = plan_copy(*arguments)
        for storage in closing.storages:
            storage.close()
        return planned

    monkeypatch.setattr("kvbm.transfer.engine.plan_copy", plan)
    with TransferEngine(num_threads=1, backend=closing.backend) as engine:
        closing.arm(2)
        assert engine.copy(source, destination, IDS, IDS).result().num_blocks == 4
    assert closing.num_closed == 1
