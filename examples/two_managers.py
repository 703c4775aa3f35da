"""Two managers in one process that share nothing: two models, two directories, no common block.

Run it: ``python examples/two_managers.py``.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

import kvbm

os.environ["KVBM_DEVICE"] = "cpu"  # NumPy looks into blocks here, and sees none in a GPU's memory


def open_manager(model: str, num_layers: int, directory: Path) -> kvbm.BlockManager:
    return kvbm.BlockManager(
        num_layers=num_layers, page_size=16, inner_dim=32, dtype="float32", model=model, worker_id=model,
        device_blocks=8, disk_blocks=32, disk_path=directory,
    )  # fmt: skip


def cache(manager: kvbm.BlockManager, token_ids: range, value: float) -> None:
    """Fill the blocks of a prompt with a value and leave them cached."""
    sequence = manager.sequence(token_ids)
    fresh = manager.allocate_blocks(sequence.num_full_blocks)
    for block in fresh:
        block.numpy()[...] = value
    manager.register_blocks(fresh.complete(sequence.hashes)).release()


def read(manager: kvbm.BlockManager, token_ids: range) -> list[float]:
    """Give the first element of each cached block of a prompt."""
    hit = manager.match_sequence_hashes(manager.sequence(token_ids).hashes)
    with manager.onboard(hit).result() as blocks:
        return [float(block.numpy().flat[0]) for block in blocks]


prompt = range(64)  # 4 blocks
with tempfile.TemporaryDirectory() as parent:
    small, large = open_manager("small", 2, Path(parent, "small")), open_manager("large", 6, Path(parent, "large"))
    with small, large:
        one, other = small.sequence(prompt).hashes, large.sequence(prompt).hashes
        assert not np.isin(one, other).any()  # the model is a part of every name

        cache(small, prompt, 1.0)
        print(f"cached in small: small finds {small.lookup(one)} blocks, large {large.lookup(other)}")
        assert large.lookup(one) == 0  # even by the other's names: the pools are two

        cache(large, prompt, 2.0)
        for manager in (small, large):
            manager.flush()
            manager.reset_pool("device")
        print(f"from disk: small reads {read(small, prompt)}, large {read(large, prompt)}")

        small.reset_all()
        print(f"small reset: small finds {small.lookup(one)} blocks, large {large.lookup(other)}")
        try:
            open_manager("third", 2, Path(parent, "large"))
        except kvbm.errors.StorageError as error:
            print(f"a third on large's directory is refused: {type(error).__name__}, errno {error.errno}")

    with open_manager("small", 2, Path(parent, "small")):  # free again once it is closed
        print("small opens its directory again")
