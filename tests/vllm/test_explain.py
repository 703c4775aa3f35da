"""``kvbm explain`` beside the real engine: requests that missed, that loaded, and that the engine had itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_site import Engine, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
HEAD = prompt_of(80, 300)  # 4 blocks of 64 tokens, and some
LONGER = [*HEAD[:256], *prompt_of(81, 244)]  # these 4, and 3 more


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder where processes of this test listen, and no others."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where there is no such folder
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "kvbm"


def explain(*arguments: str) -> tuple[int, str, str]:
    """Run the command in a process of its own; give its exit status and what it wrote."""
    command = [sys.executable, "-m", "kvbm.cli.main", "explain", *arguments]
    env = {**os.environ, "COLUMNS": "200", "TMPDIR": tempfile.gettempdir()}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, check=False, timeout=100, cwd=tempfile.gettempdir()
    )
    return done.returncode, done.stdout, done.stderr


def told(request: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give what a request is explained by, and its last answer."""
    status, text, trouble = explain(request, "--json", "--pid", str(os.getpid()))
    assert (status, trouble) == (0, "")
    found = json.loads(text)
    return found, found["answers"][-1]


def test_requests_that_missed_loaded_and_hit_are_told_apart(start: Start, sockets: Path, tmp_path: Path) -> None:
    engine = start(disk=tmp_path / "disk")
    engine.generate([HEAD])
    engine.forget()
    for _ in range(2):
        engine.generate([LONGER])
    engine.settle()

    cold, answer = told("0")
    assert (cold["summary"]["state"], cold["summary"]["chain_blocks"], cold["loads"]) == ("finished", 4, [])
    assert (answer["engine_blocks"], cold["summary"]["promised_blocks"]) == (0, 0)
    (miss,) = answer["misses"]
    assert miss["block"] == 0
    reasons = {reason["tier"]: reason["why"] for reason in miss["reasons"]}
    assert reasons == {"host": "never seen", "disk": "never seen", "remote": "tier absent"}
    assert cold["saved_blocks"] == 4

    loaded, answer = told("1")
    assert (answer["engine_blocks"], answer["there_blocks"], answer["usable_blocks"]) == (0, 4, 7)
    assert [miss["block"] for miss in answer["misses"]] == [4]
    (load,) = loaded["loads"]
    assert (load["loaded_blocks"], load["sources"], load["losses"]) == (4, {"host": 4}, [])
    assert loaded["first_hash"] == cold["first_hash"]

    local, answer = told("2")
    assert (answer["engine_blocks"], answer["misses"], local["summary"]["promised_blocks"]) == (7, [], 0)
    assert (local["loads"], local["last_hash"]) == ([], loaded["last_hash"])
    engine.calm()


def test_operator_sees_the_recent_requests_one_of_them_and_what_is_wrong(
    start: Start, sockets: Path, tmp_path: Path
) -> None:
    engine = start(disk=tmp_path / "disk")
    engine.generate([HEAD])
    engine.forget()
    engine.generate([LONGER])

    status, text, _ = explain()
    assert status == 0
    assert f"process {os.getpid()}: 2 recent requests" in text
    assert "4 host" in text
    status, text, _ = explain("1")
    assert status == 0
    assert "4 of 7 blocks that can be used, 0 of them in the engine" in text
    assert "the host tier has not had it since this process began" in text
    assert "4 of 4 came" in text
    status, text, _ = explain("nobody")
    assert status == 1
    assert f"no recent request begins with 'nobody'; asked process {os.getpid()} (2 requests)" in text
    status, _, trouble = explain("1", "--pid", "1")
    assert status == 2
    assert "process 1 does not explain itself" in trouble

    assert [path.name for path in sockets.iterdir()] == [f"kvbm-{os.getpid()}.sock"]
    engine.close()
    assert list(sockets.iterdir()) == []
    status, _, trouble = explain()
    assert status == 2
    assert "no process of yours explains itself" in trouble


def test_connector_that_is_told_not_to_explain_opens_no_socket(start: Start, sockets: Path) -> None:
    start(extra={"host": "64MiB", "explain": False})
    assert not sockets.exists() or not list(sockets.iterdir())
