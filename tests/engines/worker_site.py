"""A worker's half around memory of its own, on the CPU or on a GPU: blocks that say what they are, and orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend
from kvbm.engines.messages import LoadOrder, StepOrders, decode_report, encode_orders
from kvbm.engines.shard import LayerMemory, Shard
from kvbm.engines.worker import StepNews, WorkerCore
from kvbm.gpu import DeviceMemory, Gpu
from kvbm.jobs import CopyJob, encode
from kvbm.jobs.messages import decode_result
from kvbm.types import Tier

PATIENCE_S = 60.0
NUM_LAYERS, NUM_SLOTS, LAYER_NBYTES = 3, 8, 128
NBYTES = NUM_LAYERS * LAYER_NBYTES


def content(seed: int) -> npt.NDArray[np.uint8]:
    """Give the bytes of a block: (nbytes,)."""
    return np.random.default_rng(seed).integers(0, 256, NBYTES, dtype=np.uint8)


def names_of(*seeds: int) -> npt.NDArray[np.uint64]:
    return np.array([[seed, 77] for seed in seeds], dtype=np.uint64).reshape(-1, 2)


def ids(*numbers: int) -> npt.NDArray[np.int32]:
    return np.array(numbers, dtype=np.int32)


def layers_on(gpu: Gpu | None, *, is_outermost: bool = False, num_slots: int = NUM_SLOTS) -> list[LayerMemory]:
    """Give an engine's memory: a tensor for each layer, or all layers of a block together."""
    nbytes = NUM_LAYERS * num_slots * LAYER_NBYTES
    device = None if gpu is None else 0
    pitch, stride = num_slots * LAYER_NBYTES, LAYER_NBYTES
    if is_outermost:
        pitch, stride = LAYER_NBYTES, NBYTES
    memory: Any = np.zeros(nbytes, dtype=np.uint8) if gpu is None else DeviceMemory(gpu, nbytes)
    start = memory.ctypes.data if gpu is None else memory.address
    return [
        LayerMemory(start + layer * pitch, num_slots, stride, LAYER_NBYTES, memory, device)
        for layer in range(NUM_LAYERS)
    ]


class WorkerSite:
    """One worker with one group of layers and a host tier."""

    def __init__(self, backend: Backend, gpu: Gpu | None = None, *, is_outermost: bool = False) -> None:
        layers = layers_on(gpu, is_outermost=is_outermost)
        self.shard = Shard(layers, {"host": {"num_blocks": 8}}, fingerprint="m", backend=backend)
        self.core = WorkerCore([self.shard.executor])
        self.num_jobs = 0

    @property
    def engine(self) -> Any:
        return self.shard.storages[Tier.DEVICE]

    @property
    def host(self) -> Any:
        return self.shard.storages[Tier.HOST]

    def write(self, slot: int, seed: int) -> None:
        """Fill a slot of the engine's."""
        self.engine.write(ids(slot), content(seed)[None])

    def seed_in(self, storage: Any, block: int, seeds: range = range(40)) -> int | None:
        """Tell whose bytes a block holds."""
        (data,) = storage.read(ids(block))
        return next((seed for seed in seeds if np.array_equal(data, content(seed))), None)

    def job(self, source: Tier, pairs: dict[int, int], *seeds: int) -> CopyJob:
        self.num_jobs += 1
        return CopyJob(
            job_id=self.num_jobs,
            source=source,
            destination=Tier.HOST if source is Tier.DEVICE else Tier.DEVICE,
            source_ids=ids(*pairs),
            destination_ids=ids(*pairs.values()),
            hashes=names_of(*seeds),
            is_urgent=source is Tier.HOST,
        )

    def save(self, slot: int, block: int, seed: int) -> CopyJob:
        return self.job(Tier.DEVICE, {slot: block}, seed)

    def load(self, block: int, slot: int, seed: int) -> CopyJob:
        return self.job(Tier.HOST, {block: slot}, seed)

    def orders(self, *jobs: CopyJob, loads: list[LoadOrder] | None = None, has_fence: bool = False) -> bytes:
        return encode_orders(StepOrders(jobs=[[encode(job) for job in jobs]], loads=loads or [], has_fence=has_fence))

    def sync(self, *jobs: CopyJob, lost: list[int] | None = None) -> LoadOrder:
        job_ids = [(0, job.job_id) for job in jobs]
        return LoadOrder(request_id="r", job_ids=job_ids, lost_slots=lost or [], is_sync=True)

    def put_below(self, *seeds: int) -> None:
        """Save blocks to host block i, by way of slot 0."""
        for block, seed in enumerate(seeds):
            self.write(0, seed)
            self.core.begin(self.orders(self.save(0, block, seed)))
            self.core.fence(PATIENCE_S)
        self.core.take()

    def spoil(self, block: int) -> None:
        """Flip a bit of a host block."""
        self.host.buffers[0][block * self.host.layout.strides.block] ^= 1

    def outcomes(self, news: StepNews) -> dict[int, list[int]]:
        """Give the outcomes of jobs by their number."""
        (group,) = decode_report(news.report).results
        return {result.job_id: result.outcomes.tolist() for result in map(decode_result, group)}

    def close(self) -> None:
        assert self.core.close(PATIENCE_S)
        self.shard.close()
