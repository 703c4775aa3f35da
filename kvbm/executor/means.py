"""What every copy of an executor needs: the storages, the copy engines, the staging ring, and the clock."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.errors import ConfigError
from kvbm.gpu import Gpu
from kvbm.jobs import CopyJob, Outcome, Transfer
from kvbm.landing import wait_until_landed
from kvbm.layout import BlockLayout
from kvbm.storage.base import Storage
from kvbm.storage.staging import StagingRing
from kvbm.transfer import GpuTransferEngine, TransferEngine
from kvbm.types import HashArray, IdArray, Places, Tier

_log = logging.getLogger("kvbm.executor")

_STAGING_BLOCKS, _STAGING_NBYTES = 16, 32 << 20
_PAGE_NBYTES = 4096

Outcomes = npt.NDArray[np.uint8]


class CopyMeans:
    """Storages and engines of one executor, and the steps that several kinds of copy share.

    Parameters
    ----------
    storages, copy_threads, copy_thread_blocks, staging_blocks, verifies, backend, clock
        As for `Executor`.
    """

    def __init__(
        self,
        storages: Mapping[Tier, Storage],
        *,
        copy_threads: int,
        copy_thread_blocks: int,
        staging_blocks: int,
        verifies: bool,
        backend: Backend,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storages = dict(storages)
        self.verifies = verifies
        self.clock = clock
        # Copies run in the thread that executes the job, so nothing is small or large to the engines.
        self._urgent = TransferEngine(num_threads=copy_threads, small_nbytes=sys.maxsize, backend=backend)
        half = max(1, self._urgent.num_threads // 2)
        self._background = TransferEngine(num_threads=half, small_nbytes=sys.maxsize, backend=backend)
        gpu = _gpu_of(storages)
        self._gpu: GpuTransferEngine | None = None
        if gpu is not None:
            self._gpu = GpuTransferEngine(gpu, host_engine=self._urgent, num_thread_blocks=copy_thread_blocks)
        remote = [storage for storage in storages.values() if not storage.capabilities.is_addressable]
        self._staging: StagingRing | None = None
        if remote:
            num_slots = staging_blocks or _num_slots_of(remote[0].layout)
            self._staging = StagingRing(remote[0].layout, num_slots, gpu=gpu, backend=backend, clock=clock)

    def close(self) -> None:
        """Let go of engines and ring."""
        if self._gpu is not None:
            self._gpu.close()
        self._urgent.close()
        self._background.close()
        if self._staging is not None:
            self._staging.storage.close()

    # -- storages ----------------------------------------------------------------------------------------------

    def storage(self, tier: Tier) -> Storage:
        """Give the storage of a tier; raises `ConfigError` where there is none."""
        try:
            return self._storages[tier]
        except KeyError:
            known = ", ".join(known.value for known in self._storages)
            raise ConfigError(f"this executor has no tier {tier.value!r}, it has {known}") from None

    def is_there(self, tier: Tier) -> bool:
        """Whether a tier can be reached; one that nobody knows is not away."""
        return tier not in self._storages or self._storages[tier].is_available

    def is_addressable(self, tier: Tier) -> bool:
        """Whether a tier is known and has addresses."""
        return tier in self._storages and self._storages[tier].capabilities.is_addressable

    @property
    def staging(self) -> StagingRing:
        """The ring that blocks pass through on their way to or from storages without addresses."""
        assert self._staging is not None, "made with every storage that has no addresses"
        return self._staging

    # -- time --------------------------------------------------------------------------------------------------

    def is_over(self, deadline: float | None) -> bool:
        """Whether a job's time is over."""
        return deadline is not None and self.clock() >= deadline

    def wait(self, transfer: Transfer[Any], deadline: float | None) -> bool:
        """Wait for a transfer until the deadline; return whether it has ended."""
        return transfer.wait(None if deadline is None else max(0.0, deadline - self.clock()))

    # -- steps -------------------------------------------------------------------------------------------------

    def lost(self, job: CopyJob) -> Outcome:
        """Tell what blocks are that did not come: those of a storage that cannot be reached may be good."""
        return Outcome.FAILED if self.is_there(job.source) else Outcome.LATE

    def copy(
        self, job: CopyJob, source: tuple[Storage, IdArray], destination: tuple[Storage, IdArray], part: slice | Places
    ) -> npt.NDArray[np.bool_]:
        """Copy a part of a job between memories; tell where the source matched its checksum."""
        names = job.hashes[part] if self.verifies else None
        ends = source[0], destination[0], source[1], destination[1]
        if self._gpu is None or not any(storage.capabilities.is_gpu for storage in ends[:2]):
            return self._engine(job).copy(*ends, hashes=names).result().good
        transfer = self._gpu.copy(*ends, hashes=names, is_urgent=job.is_urgent)
        try:
            return transfer.result().good
        finally:  # whoever hears of an interrupt gives the blocks to others
            wait_until_landed(transfer)

    def compute_checksums(
        self, job: CopyJob, storage: Storage, ids: IdArray, hashes: HashArray
    ) -> npt.NDArray[np.uint64]:
        """Compute the checksums of blocks where they lie, with as many threads as the job may have."""
        engine = self._gpu if self._gpu is not None and storage.capabilities.is_gpu else self._engine(job)
        return engine.compute_checksums(storage, ids, hashes)

    def disown(self, source: Storage, block_ids: IdArray, hashes: HashArray) -> None:
        """Tell a source which of its blocks are bad; the good ones of a job are as good as ever if that fails."""
        try:
            source.disown(block_ids, hashes)
        except Exception as error:
            _log.warning("bad blocks stay known source=%r num_blocks=%d error=%r", source, len(hashes), error)

    def _engine(self, job: CopyJob) -> TransferEngine:
        return self._urgent if job.is_urgent else self._background


def judge(good: npt.NDArray[np.bool_]) -> Outcomes:
    """Give the outcomes of blocks that were compared with their checksums."""
    return np.where(good, Outcome.OK, Outcome.CORRUPT).astype(np.uint8)


def _gpu_of(storages: Mapping[Tier, Storage]) -> Gpu | None:
    """Give the GPU on which a tier lies, None where none does."""
    for storage in storages.values():
        if isinstance(gpu := getattr(storage, "gpu", None), Gpu) and storage.capabilities.is_gpu:
            return gpu
    return None


def _num_slots_of(layout: BlockLayout) -> int:
    """Give the slots that fill the bytes of the ring, each from one page to another."""
    slot_nbytes = -(-layout.block_nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
    return max(_STAGING_BLOCKS, _STAGING_NBYTES // slot_nbytes)
