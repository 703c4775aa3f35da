"""Processes that leave while requests hang, and the proxy and server that the other tests stand on."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from object_site import PATIENCE_S

from kvbm.testing.object_server import ObjectServer, free_ports
from kvbm.testing.proxy import FaultyProxy, ProxyFault

LEAVE = """
import numpy as np
from kvbm.layout import BlockLayout
from kvbm.storage.object_store import ObjectStorage
from kvbm.testing.proxy import FaultyProxy, ProxyFault

layout = BlockLayout.fully_contiguous(
    num_blocks=4, num_layers=1, outer_dim=1, block_size=4, inner_dim=4, dtype="uint8"
)
proxy = FaultyProxy(1)
proxy.inject(ProxyFault.BLACKHOLE)
options = {"endpoint": f"http://127.0.0.1:{proxy.port}", "region": "us-east-1", "allow_http": True}
storage = ObjectStorage(layout, "s3://bucket", fingerprint="m", options=options)
ids, memory = np.arange(4, dtype=np.int32), np.zeros((4, 16), dtype=np.uint8)
hashes = np.arange(8, dtype=np.uint64).reshape(4, 2)
transfers = [submit(ids, memory, ids, hashes=hashes) for submit in (storage.submit_write, storage.submit_read)]
assert proxy.wait_for_requests(8)
print("leaving")
"""


def test_a_process_leaves_at_once_and_quietly_while_requests_hang(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def ask(port: int, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, "/")
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_proxy_does_what_it_is_told(server: ObjectServer) -> None:
    with FaultyProxy(server.port) as proxy:
        status, body = ask(proxy.port)
        assert (status, len(body) > 100) == (403, True)
        proxy.inject(ProxyFault.ERROR_500, num_requests=1)
        assert ask(proxy.port)[0] == 500
        proxy.inject(ProxyFault.SLOW_DOWN, num_requests=1)
        status, body = ask(proxy.port)
        assert (status, b"SlowDown" in body) == (503, True)
        proxy.inject(ProxyFault.RESET, num_requests=1)
        with pytest.raises(ConnectionError):
            ask(proxy.port)
        proxy.inject(ProxyFault.TRUNCATED, num_requests=1)
        with pytest.raises(http.client.IncompleteRead):
            ask(proxy.port)
        assert ask(proxy.port, "HEAD") == (405, b"")
        proxy.disconnect()
        with pytest.raises(ConnectionError):
            ask(proxy.port)
        proxy.connect()
        assert ask(proxy.port)[0] == 403
    assert not [thread for thread in threading.enumerate() if thread.name == "faulty-proxy"]
    with pytest.raises(ConnectionError):
        ask(proxy.port)


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
