"""What the tests of the executor share: storages of several layouts with known content, and jobs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from keyed_site import KeyedSite

from kvbm._backend import Backend
from kvbm.executor import Executor
from kvbm.jobs import CopyJob
from kvbm.layout import BlockLayout
from kvbm.storage import HostStorage, Storage
from kvbm.storage.device import DeviceStorage
from kvbm.storage.disk import DiskStorage
from kvbm.testing.faults import FaultPlan, FaultyStorage
from kvbm.types import Tier

NUM_BLOCKS = 12
DIMENSIONS: dict[str, Any] = {
    "num_blocks": NUM_BLOCKS,
    "num_layers": 3,
    "outer_dim": 2,
    "block_size": 4,
    "inner_dim": 12,
    "dtype": "uint8",
    "num_heads": 3,
}
HEAD, TOKEN, REGION = 4, 12, 48


def layout_of(kind: str) -> BlockLayout:
    if kind == "contiguous":
        return BlockLayout.fully_contiguous(**DIMENSIONS)
    if kind == "aligned":
        return BlockLayout.fully_contiguous(**DIMENSIONS, alignment=4096)
    if kind == "padded":
        strides = {"block": 512, "layer": 2 * REGION, "outer": REGION, "token": TOKEN, "head": HEAD}
        return BlockLayout.custom(**DIMENSIONS, strides=strides)
    if kind == "by head":
        strides = {"block": 6 * REGION, "layer": 2 * REGION, "outer": REGION, "token": HEAD, "head": 4 * HEAD}
        return BlockLayout.custom(**DIMENSIONS, strides=strides)
    return BlockLayout.layer_separate(**DIMENSIONS, block_first=kind == "by layer, block first")


class Site:
    """One rank: an executor over storages, each with a place for every block."""

    def __init__(self, directory: Path, backend: Backend, kinds: dict[str, str], **settings: Any) -> None:
        plans: dict[str, FaultPlan] = settings.pop("faults", {})
        self.storages: dict[Tier, Storage] = {}
        for name, kind in kinds.items():
            tier, layout = Tier(name), layout_of(kind)
            storage: Storage
            if tier is Tier.DISK:
                storage = DiskStorage(layout, directory / name)
            else:
                storage = (DeviceStorage if tier is Tier.DEVICE else HostStorage)(layout, backend=backend)
            self.storages[tier] = FaultyStorage(storage, plans[name]) if name in plans else storage
        self.executor = Executor(self.storages, backend=backend, **settings)
        self.hashes = np.random.default_rng(5).integers(0, 2**63, (NUM_BLOCKS, 2), dtype=np.uint64)

    def __getitem__(self, name: str) -> Any:
        return self.storages[Tier(name)]

    @property
    def ring(self) -> Any:
        return self.executor._means.staging

    def content(self, name: str, ids: Any = range(NUM_BLOCKS)) -> npt.NDArray[np.uint8]:
        """Read blocks in logical order, tokens before heads whatever the layout."""
        data = self[name].read(np.array(ids, dtype=np.int32))
        if self[name].layout.region_order == ("head", "token"):
            data = data.reshape(-1, 6, 3, 4, HEAD).swapaxes(2, 3).reshape(len(data), -1)
        return data

    def fill(self, name: str, seed: int = 1) -> npt.NDArray[np.uint8]:
        """Write every block of a tier; give what `content` will read."""
        storage = self[name]
        data = np.random.default_rng(seed).integers(0, 256, (NUM_BLOCKS, storage.layout.block_nbytes), dtype=np.uint8)
        storage.write(np.arange(NUM_BLOCKS, dtype=np.int32), data)
        return self.content(name)

    def job(self, route: str, source_ids: Any, destination_ids: Any, names: Any = None, **fields: Any) -> CopyJob:
        """Make a job for e.g. "host-disk"; blocks are named after their first slot unless told otherwise."""
        source, destination = route.split("-")
        fields.setdefault("is_urgent", route.startswith("disk"))  # others leave half of the ring
        return CopyJob(
            job_id=7,
            source=Tier(source),
            destination=Tier(destination),
            source_ids=np.array(source_ids, dtype=np.int32),
            destination_ids=np.array(destination_ids, dtype=np.int32),
            hashes=self.hashes[list(source_ids if names is None else names)],
            **fields,
        )

    def run(self, route: str, source_ids: Any, destination_ids: Any, names: Any = None, **fields: Any) -> Any:
        deadline = fields.pop("deadline", None)
        return self.executor.execute(self.job(route, source_ids, destination_ids, names, **fields), deadline)

    def close(self) -> None:
        self.executor.close()
        for storage in self.storages.values():
            storage.close()


@pytest.fixture
def make_site(tmp_path: Path, backend: Backend) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def make(kinds: dict[str, str], **settings: Any) -> Site:
        sites.append(Site(tmp_path / str(len(sites)), backend, kinds, **settings))
        return sites[-1]

    (tmp_path / "0").mkdir()
    yield make
    for site in sites:
        site.close()


@pytest.fixture
def make_keyed(backend: Backend) -> Iterator[Callable[..., KeyedSite]]:
    sites: list[KeyedSite] = []

    def make(**settings: Any) -> KeyedSite:
        sites.append(KeyedSite(backend, **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.close()
