"""The connector as the doctor starts it: the same one, and it remembers vLLM's tensors and sends golden blocks."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np

from kvbm.engines.doctor.golden import ByteArray, GoldenRun
from kvbm.engines.doctor.report import describe_disk
from kvbm.engines.shard import Shard
from kvbm.engines.vllm.connector import KvbmConnector
from kvbm.types import IdArray, Tier


class DoctorConnector(KvbmConnector):
    """`KvbmConnector`, with `examine`."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Remember the tensors, and take them over."""
        self._kv_caches = kv_caches
        super().register_kv_caches(kv_caches)

    def examine(self, copy_timeout_s: float) -> dict[str, list[dict[str, Any]]]:
        """Send golden blocks through every group's tiers, and tell of its layout.

        Returns
        -------
        dict of str to list of dict
            "layouts", "disks" and "golden", plain values as `ReportWriter` takes them.
        """
        worker = self._here()
        core, shards = worker._core, worker._shards
        assert core is not None, "vLLM has registered its tensors"
        num_blocks = getattr(worker._cache, "num_blocks", None)
        groups = [
            [self._kv_caches[name] for name in group.layer_names if name in self._kv_caches]
            for group in worker._cache.kv_cache_groups
        ]
        memories = [TensorMemory(tensors, num_blocks) for tensors in groups]
        run = GoldenRun(
            core, [shard.storages for shard in shards], memories, rank=worker._rank, timeout_s=copy_timeout_s
        )
        layouts = [
            {
                "group": index,
                "rank": worker._rank,
                "is_shared": worker.share_of_group(index, has_gpu=tensors[0].device.type == "cuda") is not None,
                **_describe(shard, tensors),
            }
            for index, (shard, tensors) in enumerate(zip(shards, groups, strict=True))
        ]
        golden = [result.to_dict() for result in run.run()]
        disks = [disk for shard in shards if (disk := describe_disk(shard.storages)) is not None]
        return {"layouts": layouts, "disks": disks, "golden": golden}


class TensorMemory:
    """One group's tensors, by vLLM's own index of blocks; see `EngineMemory`.

    Parameters
    ----------
    tensors : list of Tensor
        One a layer; the first axis counts blocks. Layers that share a tensor are one.
    num_blocks : int, optional
        That vLLM counts; its kernels may cut each into several. None: as many as a tensor has.
    """

    def __init__(self, tensors: list[Any], num_blocks: int | None = None) -> None:
        self._torch = importlib.import_module("torch")
        self._tensors = list({tensor.data_ptr(): tensor for tensor in tensors}.values())
        first = self._tensors[0]
        self.num_slots = num_blocks or int(first.shape[0])
        self._num_parts = int(first.shape[0]) // self.num_slots  # of a block
        self._nbytes = [self._num_parts * one[0].numel() * one.element_size() for one in self._tensors]
        self.block_nbytes = sum(self._nbytes)

    def write(self, slots: IdArray, data: ByteArray) -> None:
        """Write blocks: (num_slots, block_nbytes) uint8, host."""
        rows = self._rows(slots)
        for tensor, part in zip(self._tensors, np.split(data, np.cumsum(self._nbytes)[:-1], axis=1), strict=True):
            values = self._torch.from_numpy(np.ascontiguousarray(part)).view(tensor.dtype)
            values = values.reshape(len(rows), *tensor.shape[1:])
            tensor[rows.to(tensor.device)] = values.to(tensor.device)
        self._wait()

    def read(self, slots: IdArray) -> ByteArray:
        """Read blocks: (num_slots, block_nbytes) uint8, host."""
        self._wait()
        rows = self._rows(slots)
        parts = []
        for tensor in self._tensors:
            values = tensor[rows.to(tensor.device)].reshape(len(slots), -1).contiguous().cpu()
            parts.append(values.view(self._torch.uint8).numpy())
        return np.concatenate(parts, axis=1)

    def _rows(self, slots: IdArray) -> Any:
        """Give the places of these blocks' parts on the tensors' first axis."""
        first = slots.astype(np.int64) * self._num_parts
        return self._torch.from_numpy((first[:, None] + np.arange(self._num_parts)).reshape(-1))

    def _wait(self) -> None:
        """Wait until nothing moves on a GPU, in whichever stream."""
        if self._tensors[0].device.type == "cuda":
            self._torch.cuda.synchronize(self._tensors[0].device)


def examine_worker(worker: Any, copy_timeout_s: float) -> dict[str, list[dict[str, Any]]]:
    """Examine the connector of a vLLM worker; runs in the worker's process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector: DoctorConnector = get_kv_transfer_group()
    return connector.examine(copy_timeout_s)


def _describe(shard: Shard, tensors: list[Any]) -> dict[str, Any]:
    """Give what names the layout of a group's blocks, and its digest."""
    layout, first = shard.storages[Tier.DEVICE].layout, tensors[0]
    below = next(storage.layout for tier, storage in shard.storages.items() if tier is not Tier.DEVICE)
    described = f"shape {tuple(first.shape)}, strides {tuple(first.stride())}, {first.dtype}"
    names = [layout.num_layers, layout.block_nbytes, below.block_nbytes, tuple(first.shape[1:]), str(first.dtype)]
    return {
        "num_layers": layout.num_layers,
        "num_blocks": layout.num_blocks,
        "block_nbytes": layout.block_nbytes,
        "layer_nbytes": layout.block_nbytes // layout.num_layers,
        "stride_nbytes": first.stride(0) * first.element_size(),
        "device": str(first.device),
        "described": described,
        "fingerprint": hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest(),
    }
