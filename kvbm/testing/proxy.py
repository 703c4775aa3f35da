"""A small HTTP proxy that misbehaves to order: what stands between a client and a server that is far away.

One thread a connection, on loopback. What goes wrong is looked up for every request, so connections that a client keeps
open are hit too. Requests and answers pass byte for byte where nothing goes wrong.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
from types import TracebackType

_PATIENCE_S = 60.0  # for bytes of either side, so that no thread is left for ever
_CHUNK = 1 << 16
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class ProxyFault(str, enum.Enum):
    """What happens to a request."""

    NONE = "none"
    LATENCY = "latency"  # it is sent on after `latency_s`
    RESET = "reset"  # it is read, then the connection is reset
    HALF_OPEN = "half open"  # half of the answer's body comes, then nothing, and the connection stays
    TRUNCATED = "truncated"  # half of the answer's body comes, then the end
    FLIPPED = "flipped"  # one bit of the answer's body is another
    ERROR_500 = "500"  # the server is not asked
    SLOW_DOWN = "503"  # the same, as S3 says it
    BLACKHOLE = "blackhole"  # it is read and never answered, the server is not asked


class FaultyProxy:
    """A proxy in front of an HTTP/1.1 server; a context manager.

    Parameters
    ----------
    port : int
        Of the server, on 127.0.0.1.
    latency_s : float
        Seconds of `ProxyFault.LATENCY`.

    Attributes
    ----------
    port : int
        To connect to, on 127.0.0.1; stays the same.
    num_requests : int
        Requests that came.
    num_at_once, max_at_once : int
        Requests under way, now and at most.

    Examples
    --------
    >>> with FaultyProxy(1) as proxy:
    ...     proxy.inject(ProxyFault.SLOW_DOWN, num_requests=2)
    ...     proxy.num_requests
    0
    """

    def __init__(self, port: int, *, latency_s: float = 0.05) -> None:
        self.latency_s = latency_s
        self.num_requests = 0
        self.max_at_once = 0
        self._upstream = ("127.0.0.1", port)
        self._fault = ProxyFault.NONE
        self._num_left: int | None = None  # requests that the fault still hits; None: all
        self.num_at_once = 0
        self._lock = threading.Condition()
        self._is_closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.connect()

    # -- for the test ------------------------------------------------------------------------------------------

    def inject(self, fault: ProxyFault, *, num_requests: int | None = None) -> None:
        """Let a fault hit the next requests, or all from now on."""
        with self._lock:
            self._fault, self._num_left = fault, num_requests

    def wait_until_idle(self, timeout: float = _PATIENCE_S) -> bool:
        """Wait until no request is under way; False when `timeout` seconds pass before."""
        with self._lock:
            return self._lock.wait_for(lambda: not self.num_at_once, timeout)

    def wait_for_requests(self, num_at_once: int, timeout: float = _PATIENCE_S) -> bool:
        """Wait until so many requests are under way; False when `timeout` seconds pass before."""
        with self._lock:
            return self._lock.wait_for(lambda: self.num_at_once >= num_at_once, timeout)

    def disconnect(self) -> None:
        """Be gone: refuse connections, and reset those that there are."""
        with self._lock:
            listener, self._listener = self._listener, None
            sockets = list(self._sockets)
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        for each in sockets:
            _reset(each)

    def connect(self) -> None:
        """Be there, or back, on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._start(self._accept, listener)

    def close(self) -> None:
        """End every connection and thread."""
        self._is_closing.set()
        self.disconnect()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- threads -----------------------------------------------------------------------------------------------

    def _start(self, target: object, sock: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(sock,), name="faulty-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                self._keep(client)
                self._start(self._serve, client)

    def _keep(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_PATIENCE_S)
        with self._lock:
            self._sockets.add(sock)

    def _serve(self, client: socket.socket) -> None:
        upstream = socket.socket()
        try:
            self._keep(upstream)
            is_connected = False
            reader = _Reader(client)
            while (request := reader.message(has_body=True)) is not None:
                fault = self._begin()
                try:
                    if fault is ProxyFault.LATENCY:
                        self._is_closing.wait(self.latency_s)
                    elif fault in (ProxyFault.ERROR_500, ProxyFault.SLOW_DOWN):
                        status = b"500 Internal Server Error" if fault is ProxyFault.ERROR_500 else b"503 Slow Down"
                        client.sendall(_answer(status, _SLOW_DOWN))
                        continue
                    elif fault is ProxyFault.RESET:
                        _reset(client)
                        return
                    elif fault is ProxyFault.BLACKHOLE:
                        client.recv(1)  # until the client gives up
                        return
                    if not is_connected:
                        upstream.connect(self._upstream)
                        is_connected, answers = True, _Reader(upstream)
                    upstream.sendall(b"".join(request))
                    answer = answers.message(has_body=not request[0].startswith(b"HEAD "))
                    if answer is None or not self._send(client, fault, *answer):
                        return
                finally:
                    self._end()
        except OSError:
            return
        finally:
            with self._lock:
                self._sockets -= {client, upstream}
            client.close()
            upstream.close()

    def _send(self, client: socket.socket, fault: ProxyFault, head: bytes, body: bytes) -> bool:
        """Pass an answer on; False where the connection is not used any more."""
        if fault is ProxyFault.FLIPPED and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault in (ProxyFault.HALF_OPEN, ProxyFault.TRUNCATED):
            client.sendall(head + body[: len(body) // 2] if body else head[: len(head) // 2])
            if fault is ProxyFault.HALF_OPEN:
                client.recv(1)
            return False
        client.sendall(head + body)
        return True

    def _begin(self) -> ProxyFault:
        with self._lock:
            self.num_requests += 1
            self.num_at_once += 1
            self.max_at_once = max(self.max_at_once, self.num_at_once)
            self._lock.notify_all()
            if self._num_left is not None:
                if not self._num_left:
                    return ProxyFault.NONE
                self._num_left -= 1
            return self._fault

    def _end(self) -> None:
        with self._lock:
            self.num_at_once -= 1
            self._lock.notify_all()


class _Reader:
    """Messages of one side of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = b""

    def message(self, *, has_body: bool) -> tuple[bytes, bytes] | None:
        """Give head and body as they came; None when the other side has closed."""
        head = self._until(b"\r\n\r\n")
        if head is None:
            return None
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        if fields.get(b"expect", b"").lower() == b"100-continue":
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not has_body:
            return head, b""
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            return head, self._chunks()
        return head, self._exactly(int(fields.get(b"content-length", b"0")))

    def _chunks(self) -> bytes:
        body = b""
        while True:
            line = self._until(b"\r\n")
            if line is None:
                raise ConnectionError("a chunked body ended early")
            nbytes = int(line.strip().partition(b";")[0], 16)
            body += line + self._exactly(nbytes + 2)
            if not nbytes:
                return body

    def _until(self, mark: bytes) -> bytes | None:
        while (place := self._rest.find(mark)) < 0:
            data = self._sock.recv(_CHUNK)
            if not data:
                return None
            self._rest += data
        found, self._rest = self._rest[: place + len(mark)], self._rest[place + len(mark) :]
        return found

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray(self._rest[:nbytes])
        self._rest = self._rest[nbytes:]
        while len(data) < nbytes:
            piece = self._sock.recv(min(_CHUNK, nbytes - len(data)))
            if not piece:
                raise ConnectionError("a body ended early")
            data += piece
        return bytes(data)


def _answer(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _reset(sock: socket.socket) -> None:
    """Close so that the other side hears a reset, and wake whoever waits for it here."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RD)
        sock.close()
