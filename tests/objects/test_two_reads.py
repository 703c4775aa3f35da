"""Two reads of one row at a time, an object replaced between them: neither is called corrupt, nothing is deleted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from object_site import PATIENCE_S, Blocks, FakeClient, MakeStorage

from kvbm._backend import Backend
from kvbm.executor import Executor
from kvbm.jobs import CopyJob, Outcome
from kvbm.layout import BlockLayout
from kvbm.storage import HostStorage
from kvbm.types import Tier

DIMENSIONS: dict[str, Any] = {"num_layers": 2, "outer_dim": 2, "block_size": 4, "inner_dim": 12, "dtype": "uint8"}
CONTIGUOUS = BlockLayout.fully_contiguous(num_blocks=4, **DIMENSIONS)
BY_LAYER = BlockLayout.layer_separate(num_blocks=4, block_first=True, **DIMENSIONS)


def copy(source: Tier, destination: Tier, row: int, block_id: int, blocks: Blocks) -> CopyJob:
    ids = [np.array([i], dtype=np.int32) for i in (row, block_id)]
    source_ids, destination_ids = ids if source is Tier.REMOTE else ids[::-1]
    return CopyJob(
        job_id=1, source=source, destination=destination, source_ids=source_ids, destination_ids=destination_ids,
        hashes=blocks.hashes, is_urgent=source is Tier.REMOTE,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [CONTIGUOUS, BY_LAYER])
def test_read_is_judged_by_the_checksum_that_came_with_it(
    make_storage: MakeStorage, backend: Backend, layout: BlockLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, blocks = FakeClient(), Blocks(1, CONTIGUOUS)
    remote, host = make_storage(layout=CONTIGUOUS, client=client), HostStorage(layout, backend=backend)
    executor = Executor({Tier.HOST: host, Tier.REMOTE: remote}, staging_blocks=4, backend=backend)
    host.write(blocks.ids, blocks.data)
    assert executor.execute(copy(Tier.HOST, Tier.REMOTE, 0, 0, blocks)).outcomes.tolist() == [Outcome.OK]
    submit_read = remote.submit_read

    def read_twice(*arguments: Any, **names: Any) -> Any:
        first = submit_read(*arguments, **names)
        first.result(PATIENCE_S)
        remote.checksums[arguments[0]] += np.uint64(1)  # as a second read of what replaced the object leaves it
        return first

    monkeypatch.setattr(remote, "submit_read", read_twice)
    result = executor.execute(copy(Tier.REMOTE, Tier.HOST, 0, 1, blocks))
    assert result.outcomes.tolist() == [Outcome.OK]
    assert np.array_equal(host.read(np.array([1])), blocks.data)
    assert "delete" not in client.seen
    executor.close()
    host.close()


def test_object_without_a_checksum_is_removed_where_checksums_are_compared(
    make_storage: MakeStorage, backend: Backend
) -> None:
    client, blocks = FakeClient(), Blocks(1, CONTIGUOUS)
    remote, host = make_storage(layout=CONTIGUOUS, client=client), HostStorage(BY_LAYER, backend=backend)
    executor = Executor({Tier.HOST: host, Tier.REMOTE: remote}, staging_blocks=4, backend=backend)
    remote.submit_write(blocks.ids, blocks.data, blocks.ids, hashes=blocks.hashes).result(PATIENCE_S)
    result = executor.execute(copy(Tier.REMOTE, Tier.HOST, 0, 1, blocks))
    assert result.outcomes.tolist() == [Outcome.FAILED]
    remote.forget(np.empty((0, 2), dtype=np.uint64))
    remote.forget(blocks.hashes)  # behind what was posted before
    assert client.seen.count("delete") == 2
    executor.close()
    host.close()
