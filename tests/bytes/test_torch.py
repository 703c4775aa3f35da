"""Blocks and torch tensors share memory (CONFORMANCE 22); run by the session ``interop``, which installs torch."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.config import LAYOUTS
from kvbm.manager import BlockManager

torch: Any = pytest.importorskip("torch", reason="torch is optional; nox -s interop installs it")


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_writes_are_seen_and_kept_alive(backend: Backend, layout: str) -> None:
    manager = BlockManager(
        num_layers=2, page_size=4, inner_dim=8, dtype="float16", device_blocks=2, layout=layout, backend=backend
    )
    sequence = manager.sequence(range(4))
    fresh = manager.allocate_blocks(1)
    tensor = torch.from_dlpack(fresh[0].layer(1))
    assert tensor.shape == (2, 4, 8)
    tensor.fill_(3)
    assert (fresh[0].layer(1).numpy() == 3).all()
    fresh[0].layer(1).numpy()[1, 2, 3] = 5
    assert tensor[1, 2, 3] == 5
    blocks = manager.register_blocks(fresh.complete(sequence.hashes))
    copied = torch.from_numpy(blocks[0].layer(1).numpy().copy())
    assert torch.equal(copied, tensor)
    blocks.release()
    manager.close()
    del manager, blocks, fresh
    gc.collect()
    assert int((tensor == 3).sum()) == 63
    assert np.asarray(tensor).dtype == np.float16
