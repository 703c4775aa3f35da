"""Requests as coroutines: a transfer is awaited, so the event loop serves others while bytes move.

Run it: ``python examples/asyncio_requests.py``.
"""

import asyncio
import tempfile

import kvbm

PAGE, NUM_REQUESTS = 16, 6
SYSTEM_PROMPT = range(8 * PAGE)


async def serve(manager: kvbm.BlockManager, number: int) -> int:
    """Serve one request; give the number of blocks that were reused."""
    sequence = manager.sequence([*SYSTEM_PROMPT, *range(1000 * number, 1000 * number + 4 * PAGE)])
    hit = manager.match_sequence_hashes(sequence.hashes)
    blocks = await manager.onboard(hit, timeout=5.0)  # at its deadline it gives the leading blocks that are there
    with blocks:
        num_hits = len(blocks)
        await asyncio.sleep(0)  # the model computes
        # Where all blocks are held, waiting for some must not stop the loop.
        fresh = await asyncio.to_thread(manager.allocate_blocks, sequence.num_full_blocks - num_hits, timeout=5.0)
        parent = blocks[-1].sequence_hash if blocks else None
        manager.register_blocks(fresh.complete(sequence.hashes[num_hits:], parent=parent)).release()
    return num_hits


async def main() -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        kvbm.BlockManager(
            num_layers=2, page_size=PAGE, inner_dim=64, dtype="float32", model="example",
            device_blocks=32, disk_blocks=256, disk_path=f"{directory}/blocks",
        ) as manager,
    ):  # fmt: skip
        print(f"first request: {await serve(manager, 1)} blocks reused")
        await asyncio.to_thread(manager.flush)  # everything is on disk
        manager.reset_pool("device")

        reused = await asyncio.gather(*(serve(manager, number) for number in range(2, 2 + NUM_REQUESTS)))
        print(f"{NUM_REQUESTS} requests at once: {reused} blocks reused")
        assert reused == [len(SYSTEM_PROMPT) // PAGE] * NUM_REQUESTS

        # All ask for the same blocks: those on their way are joined, those that are there are found.
        statistics = manager.statistics()
        from_disk = statistics.routes[kvbm.Tier.DISK, kvbm.Tier.DEVICE]
        print(f"{from_disk.blocks} blocks came from disk, {statistics.joined} times a block on its way was joined")
        manager.check()


asyncio.run(main())
