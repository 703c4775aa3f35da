"""vLLM's OpenAI server as a process of its own, and a client for it: whole answers, or streams that can be left."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_site import ENVIRONMENT, QUIET_S, Tokens

START_S = 240.0
_READY = "Application startup complete"


@dataclass(frozen=True)
class Answer:
    """Tokens of a text, and how many of its prompt's were cached."""

    tokens: tuple[int, ...]
    num_cached: int


class Server:
    """One server with `KvbmConnector`; use it in a ``with``.

    Parameters
    ----------
    model : Path
    extra : dict
        ``kv_connector_extra_config``.
    arguments : str
        Of the server's command line.
    """

    def __init__(self, model: Path, extra: dict[str, Any], *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        transfer = {
            "kv_connector": "KvbmConnector",
            "kv_connector_module_path": "kvbm.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--block-size", "64"]
        command += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20), "--enable-prompt-tokens-details"]
        command += ["--kv-transfer-config", json.dumps(transfer), *arguments]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # its engine is a process of its own: both are ended together
        )
        self._said: deque[str] = deque(maxlen=60)
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="server output")
        self._reader.start()

    def __enter__(self) -> Server:
        until = time.monotonic() + START_S
        while not self._is_ready.wait(1.0):
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError("the server did not start:\n" + "".join(self._said))
        while True:  # it listens a moment after it has said so
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=START_S).close()
                return self
            except ConnectionRefusedError:
                if time.monotonic() > until:
                    self.kill()
                    raise

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it and its engine as a power cut would."""
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def ask(self, prompt: Tokens, num_tokens: int = 16, *, leave_after: int | None = None) -> Answer | None:
        """Ask for a text.

        Parameters
        ----------
        prompt : list of int
        num_tokens : int
        leave_after : int, optional
            Take the answer as a stream, and hang up after so many pieces; then there is no answer.
        """
        body = {"model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": leave_after is not None}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=QUIET_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if leave_after is not None:
                num_pieces = 0
                while num_pieces < leave_after and (line := response.readline()):
                    num_pieces += line.startswith(b"data: {")
                return None
            content = json.loads(response.read())
        finally:
            connection.close()
        assert response.status == 200, content
        details = content["usage"]["prompt_tokens_details"] or {}
        return Answer(tuple(content["choices"][0]["token_ids"]), details.get("cached_tokens") or 0)

    def blocks_in(self, tier: str) -> int:
        """Count the blocks that a tier holds, as the metrics have it; they follow within a second."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=QUIET_S)
        try:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        finally:
            connection.close()
        mine = [line for line in lines if line.startswith("vllm:kvbm_blocks_inactive{") and f'tier="{tier}"' in line]
        return int(sum(float(line.rsplit(" ", 1)[1]) for line in mine))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            if _READY in line:
                self._is_ready.set()
