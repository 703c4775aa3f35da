"""Native disk queues where a process has limits, forks or ends, and what they refuse."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_native import PAGE, PATIENCE_S, aligned, disk_io, pages, wait_for

from kvbm.errors import ConfigError, StorageError

pytestmark = pytest.mark.skipif(disk_io is None, reason="the native twin has no disk queues here")


LIMITED = """
import os, resource, sys
sys.path[:0] = {path!r}
from disk_native import PAGE, aligned, disk_io
import numpy as np
fd = os.open({file!r}, os.O_RDWR | os.O_CREAT)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, 3 * PAGE))
queue, memory = disk_io.DiskQueue(fd, kind={kind!r}), aligned(4, PAGE)
one = np.array([memory.ctypes.data], np.uint64)
queue.submit(1, False, np.array([PAGE]), np.array([1]), one, np.array([4 * PAGE], np.uint64), memory)
((_, errnos, moved, _),) = queue.wait({patience})
print(errnos.tolist(), moved.tolist())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_write_beyond_the_limit_of_the_process_is_an_error(kind: str, tmp_path: Path) -> None:
    file = str(tmp_path / "data")
    answer = run(LIMITED.format(path=sys.path, file=file, kind=kind, patience=PATIENCE_S))
    assert answer.stdout.strip() == f"[{errno.EFBIG}] [{2 * PAGE}]", answer.stderr


# -- processes -------------------------------------------------------------------------------------------------

FORKED = """
import os, sys
sys.path[:0] = {path!r}
from disk_native import PAGE, aligned, disk_io
import numpy as np
from kvbm.errors import StorageError
fd = os.open({file!r}, os.O_RDWR)
queue, memory = disk_io.DiskQueue(fd, kind={kind!r}), aligned(1, PAGE)
arrays = np.array([0]), np.array([1]), np.array([memory.ctypes.data], np.uint64), np.array([PAGE], np.uint64), memory
queue.submit(1, True, *arrays)
pid = os.fork()
if not pid:
    for call in (lambda: queue.submit(2, True, *arrays), queue.wait, queue.resume, lambda: queue.last_token):
        try:
            call()
            os._exit(1)
        except StorageError as error:
            assert "a forked process opens its own" in str(error)
    queue.close()
    assert not queue.cancel(1)
    del queue
    own = disk_io.DiskQueue(fd, kind={kind!r})
    own.submit(1, True, *arrays)
    os._exit(0 if own.wait({patience}) else 2)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert queue.wait({patience})[0][0] == 1
queue.submit(3, True, *arrays)
assert queue.wait({patience})[0][0] == 3
print("whole")
"""


def test_forked_child_leaves_the_queue_alone(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(PAGE))
    answer = run(FORKED.format(path=sys.path, file=str(file), kind=kind, patience=PATIENCE_S))
    assert answer.stdout.strip() == "whole", answer.stderr


ENDING = """
import os, sys, threading
sys.path[:0] = {path!r}
from disk_native import PAGE, aligned, disk_io
import numpy as np
fd = os.open({file!r}, os.O_RDWR)
queue, memory = disk_io.DiskQueue(fd, kind={kind!r}, depth=2), aligned(256, PAGE)
addresses = (memory.ctypes.data + np.arange(256) * PAGE).astype(np.uint64)
for token in range(20):
    queue.submit(token + 1, token % 2 == 0, np.arange(256) * PAGE, np.ones(256, np.int64), addresses,
                 np.full(256, PAGE, np.uint64), memory)
{how}
print("gone")
"""
ENDS = {
    "nothing waits": "",
    "a thread waits": "threading.Thread(target=lambda: [queue.wait() for _ in range(99)], daemon=True).start()",
    "closed": "queue.close()",
    "memory goes first": "del memory, addresses",
    "in a cycle": "class Node: pass\nnode = Node(); node.node, node.queue = node, queue; del node, queue",
    "paused": "queue.pause()",
}


@pytest.mark.parametrize("how", list(ENDS))
def test_interpreter_ends_with_work_under_way(kind: str, how: str, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(256 * PAGE))
    answer = run(ENDING.format(path=sys.path, file=str(file), kind=kind, how=ENDS[how]))
    assert (answer.returncode, answer.stdout.strip(), answer.stderr) == (0, "gone", "")


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "aio"}, "kind 'aio' is not known, use threads or uring"),
        ({"kind": "threads", "depth": 0}, "depth is 0, give 1 to 1024 operations"),
        ({"kind": "uring", "depth": 1025}, "depth is 1025, give 1 to 1024 operations"),
        ({"kind": "threads", "num_threads": 0}, "num_threads"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        disk_io.DiskQueue(0, **options)


def test_ring_on_a_bad_descriptor_is_refused_with_its_errno() -> None:
    with pytest.raises(StorageError) as info:
        disk_io.DiskQueue(1 << 20, kind="uring")
    assert info.value.errno == errno.EBADF


def test_impossible_batches_are_refused_and_queue_nothing(make_queue: Any) -> None:
    queue, memory = make_queue(), aligned(2, PAGE)
    offsets, counts, addresses, lengths, _ = pages(memory, [0, 1], [0, 1])
    bad: list[tuple[tuple[Any, ...], dict[str, int]]] = [
        ((offsets.astype(np.int32), counts, addresses, lengths), {}),
        ((offsets[None], counts, addresses, lengths), {}),
        ((offsets.tolist(), counts, addresses, lengths), {}),
        ((offsets, counts[:1], addresses, lengths), {}),
        ((offsets, counts, addresses[:1], lengths), {}),
        ((offsets, counts, addresses[:1], lengths[:1]), {}),
        ((offsets, counts * 2, addresses, lengths), {}),
        ((offsets, counts * 0, addresses, lengths), {}),
        ((offsets[:1], counts[:1], addresses, lengths), {}),
        ((-offsets - 1, counts, addresses, lengths), {}),
        ((offsets, counts, addresses, lengths * np.uint64(0)), {}),
        ((offsets, counts, addresses, lengths), {"slot_nbytes": PAGE}),
        ((offsets, counts, addresses, lengths), {"slot_nbytes": PAGE, "block_nbytes": PAGE + 1}),
        ((offsets, counts, addresses, lengths), {"slot_nbytes": 2 * PAGE, "block_nbytes": 100}),
    ]
    for arrays, options in bad:
        with pytest.raises(StorageError, match="this batch is impossible"):
            queue.submit(1, True, *arrays, memory, **options)
    queue.pause()
    queue.submit(1, True, offsets, counts, addresses, lengths, memory)
    with pytest.raises(StorageError, match="token 1 is in use"):
        queue.submit(1, True, offsets, counts, addresses, lengths, memory)
    assert queue.num_waiting == 2
    queue.resume()
    wait_for(queue, 1)
