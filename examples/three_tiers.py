"""Device, host and disk: blocks go down by themselves, are evicted above, and come back verified.

The device tier here holds 16 blocks, a sixth of what is used. Run it: ``python examples/three_tiers.py``.
"""

import logging
import os
import tempfile

import numpy as np

import kvbm

os.environ["KVBM_DEVICE"] = "cpu"  # NumPy looks into blocks here, and sees none in a GPU's memory

logging.disable(logging.WARNING)  # one block is damaged on purpose below, and each such event is logged
NUM_LAYERS, PAGE, WIDTH = 4, 16, 64


def serve(manager: kvbm.BlockManager, token_ids: range) -> dict[str, int]:
    """Do for one request what an engine does; give the blocks found in each tier."""
    sequence = manager.sequence(token_ids)
    hit = manager.match_sequence_hashes(sequence.hashes)
    found = {tier: num_blocks for tier, num_blocks in hit.tiers.items() if num_blocks}
    blocks = manager.onboard(hit).result()  # in the device tier, bytes compared with their checksums
    for index, block in enumerate(blocks):
        assert (block.numpy() == token_ids[index * PAGE]).all(), "a wrong byte"

    fresh = manager.allocate_blocks(sequence.num_full_blocks - len(blocks))
    for index, block in enumerate(fresh, start=len(blocks)):
        block.numpy()[...] = token_ids[index * PAGE]  # what the model computes
    parent = blocks[-1].sequence_hash if blocks else None
    complete = fresh.complete(sequence.hashes[len(blocks) :], parent=parent)
    (blocks + manager.register_blocks(complete)).release()  # registering starts the copy to the host tier
    return found


with (
    tempfile.TemporaryDirectory() as directory,
    kvbm.BlockManager(
        num_layers=NUM_LAYERS, page_size=PAGE, inner_dim=WIDTH, dtype="float32", model="example",
        device_blocks=16, host_blocks=48, disk_blocks=128, disk_path=f"{directory}/blocks",
    ) as manager,
):  # fmt: skip
    prompts = [range(start, start + 8 * PAGE) for start in range(0, 12_000, 1000)]  # 12 prompts of 8 blocks

    for prompt in prompts:
        assert serve(manager, prompt) == {}
        manager.flush()  # only so that this example prints the same each time
    for tier, status in manager.status().items():
        print(f"{tier}: {status.inactive} of {status.total_blocks} blocks cached, {status.evictions} evicted")

    for number in (11, 9, 0):  # lately used, a while ago, long ago
        print(f"prompt {number} again: found {serve(manager, prompts[number])}")
        manager.flush()

    # A byte of the host tier's copy is turned: the hit ends before it, and the block is computed again.
    manager.reset_pool("device")
    prompt = manager.sequence(prompts[9])
    slot = int(manager.host.lookup(prompt.hashes)[5])
    manager.storage("host").buffers[0][slot * manager.layout.block_nbytes] ^= 1
    hit = manager.match_sequence_hashes(prompt.hashes)
    with manager.onboard(hit).result() as blocks:
        print(f"one byte turned in block 5: matched {hit.num_blocks}, good {len(blocks)}")
        assert np.array_equal(blocks.block_ids, manager.device.lookup(prompt.hashes[:5]))

    statistics = manager.statistics()
    print(f"hits by tier: {dict(statistics.hits)}, checksum mismatches: {dict(statistics.mismatches)}")
    for (source, destination), route in statistics.routes.items():
        dropped = dict(route.dropped)
        print(f"{source.value} to {destination.value}: {route.blocks} blocks, {route.nbytes} bytes, dropped {dropped}")
    manager.check()
