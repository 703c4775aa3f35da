"""Two requests with a shared prefix: the second finds what the first computed.

Run it: ``python examples/quickstart.py``.
"""

import os

import numpy as np

import kvbm

os.environ["KVBM_DEVICE"] = "cpu"  # NumPy looks into blocks here, and sees none in a GPU's memory

SYSTEM_PROMPT = list(range(64))  # token ids: 4 full blocks of 16


def serve(manager: kvbm.BlockManager, token_ids: list[int]) -> None:
    """Do for one request what an engine does."""
    sequence = manager.sequence(token_ids, salt=b"tenant-a")

    hit = manager.match_sequence_hashes(sequence.hashes)
    blocks = manager.onboard(hit).result()
    for index, block in enumerate(blocks):
        print(f"  block {index} is cached, layer 0 begins with {block.layer(0).numpy().flat[0]}")

    fresh = manager.allocate_blocks(sequence.num_full_blocks - len(blocks))
    for index, block in enumerate(fresh, start=len(blocks)):
        for layer in range(4):
            block.layer(layer).numpy()[...] = index  # an engine writes keys and values here
        print(f"  block {index} is computed")

    parent = blocks[-1].sequence_hash if blocks else None
    complete = fresh.complete(sequence.hashes[len(blocks) :], parent=parent)
    request = blocks + manager.register_blocks(complete)
    # ... decode while the request holds its blocks ...
    request.release()  # one release for the whole request: its deepest block will be evicted first


with (
    kvbm.BlockManager(
        num_layers=4, outer_dim=2, page_size=16, inner_dim=64, dtype="float32", device_blocks=64, model="tiny"
    ) as manager,
    manager.subscribe_events(kinds=["created"]) as events,
):
    print("first request:")
    serve(manager, [*SYSTEM_PROMPT, *range(1000, 1032)])
    print("second request, another question after the same system prompt:")
    serve(manager, [*SYSTEM_PROMPT, *range(2000, 2032)])

    status = manager.device.status()
    print(f"{status.hits} blocks reused, {status.registered_total} computed, {status.available_blocks} available")
    for event in events.poll(max_events=2):
        print(f"event {event.sequence_number}: {event.event_type.value} block {event.block_id}")
    assert status.hits == 4
    assert manager.lookup(manager.sequence(SYSTEM_PROMPT, salt=b"tenant-b").hashes) == 0  # another tenant's salt

    with manager.allocate_blocks(1) as scratch:  # the calls by bytes, for callers without NumPy
        manager.store_kv(scratch[0], 0, np.full((2, 16, 64), 7, dtype=np.float32).tobytes())
        assert len(manager.load_kv(scratch[0], 0)) == 2 * 16 * 64 * 4
