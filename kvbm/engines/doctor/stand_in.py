"""The child without an engine: memory of its own in its place, and golden blocks through the real worker's half.

Run as a module with the name of a file that holds the request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from kvbm._backend import default_backend
from kvbm.engines.doctor.golden import ByteArray, GoldenRun
from kvbm.engines.doctor.report import ReportWriter, describe_disk
from kvbm.engines.doctor.setup import make_setup
from kvbm.engines.shard import LayerMemory, Shard
from kvbm.engines.worker import WorkerCore
from kvbm.types import IdArray

_NUM_SLOTS, _NUM_LAYERS, _LAYER_NBYTES, _GAP_NBYTES = 20, 4, 16 << 10, 64
_CLOSE_S = 10.0


class StandInMemory:
    """Memory laid out as engines do: a tensor a layer, blocks with a gap between them."""

    def __init__(self) -> None:
        shape = (_NUM_SLOTS, _LAYER_NBYTES + _GAP_NBYTES)
        self._layers = [np.zeros(shape, dtype=np.uint8) for _ in range(_NUM_LAYERS)]
        self.num_slots = _NUM_SLOTS
        self.block_nbytes = _NUM_LAYERS * _LAYER_NBYTES

    def layers(self) -> list[LayerMemory]:
        """Describe it as an adapter does."""
        return [
            LayerMemory(
                address=layer.ctypes.data,
                num_blocks=_NUM_SLOTS,
                block_stride=layer.strides[0],
                block_nbytes=_LAYER_NBYTES,
                owner=layer,
            )
            for layer in self._layers
        ]

    def write(self, slots: IdArray, data: ByteArray) -> None:
        """Write blocks: (num_slots, block_nbytes) uint8."""
        for layer, part in zip(self._layers, np.split(data, _NUM_LAYERS, axis=1), strict=True):
            layer[slots, :_LAYER_NBYTES] = part

    def read(self, slots: IdArray) -> ByteArray:
        """Read blocks: (num_slots, block_nbytes) uint8."""
        return np.concatenate([layer[slots, :_LAYER_NBYTES] for layer in self._layers], axis=1)


def main(path: str) -> None:
    """Do what the request asks for."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    writer = ReportWriter(Path(request["report"]))
    try:
        writer.begin("opening the tiers")
        setup = make_setup(request["transfer"], engine={})
        memory = StandInMemory()
        shard = Shard(memory.layers(), setup.sections, fingerprint="kvbm doctor", backend=default_backend())
        disk = describe_disk(shard.storages)
        if disk is not None:
            writer.write("disks", disk)
        core = WorkerCore([shard.executor])
        run = GoldenRun(core, [shard.storages], [memory], timeout_s=request["copy_timeout_s"])
        for result in run.run(writer.begin):
            writer.write("golden", result.to_dict())
        writer.begin("closing the tiers")
        if core.close(_CLOSE_S):
            shard.close(_CLOSE_S)
    except Exception as error:
        writer.write("error", f"{type(error).__name__}: {error}")
        raise
    writer.write("end", True)


if __name__ == "__main__":
    main(sys.argv[1])
