"""``kvbm replay --resume``: a replay that is killed half-way goes on, warm, and every byte is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from kvbm.replay.progress import FILE_NAME

RUN = [sys.executable, "-m", "kvbm.cli.main", "replay"]
TIERS = ("--device", "40", "--host", "80", "--disk", "800", "--block-bytes", "512")
NUM_REQUESTS = 240


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RUN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
        timeout=100,
        cwd=tempfile.gettempdir(),  # not the source tree, which Python 3.10 would import from
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def write_trace(file: Path, num_requests: int = NUM_REQUESTS) -> Path:
    """Write requests that come back to what was asked for 40 requests before: too long ago for memory, not for disk."""
    lines = []
    for i in range(num_requests):
        first = 1000 * (i % 40)
        lines.append(json.dumps({"timestamp": i, "hash_ids": list(range(first, first + 8 + i // 40))}) + "\n")
    file.write_text("".join(lines))
    return file


def num_done(file: Path) -> int:
    try:
        saved: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return 0
    return int(saved["num_done"])


def begin_and_kill(trace: Path, slab: Path, *schedule: str, at: int) -> int:
    """Begin a replay and kill it when so many requests are done; give how many its file says are."""
    child = subprocess.Popen(
        [*RUN, str(trace), *TIERS, *schedule, "--disk-path", str(slab)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    give_up = time.monotonic() + 100
    while num_done(slab / FILE_NAME) < at:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < give_up
    child.send_signal(signal.SIGKILL)
    output, _ = child.communicate(timeout=100)
    assert child.returncode == -signal.SIGKILL, output
    saved: dict[str, Any] = json.loads((slab / FILE_NAME).read_bytes())
    return int(saved["num_done"]) + len(saved["also_done"])


@pytest.mark.parametrize("schedule", [("--sequential",), ("--concurrency", "3")])
def test_a_killed_replay_goes_on_warm_and_finds_no_wrong_byte(tmp_path: Path, schedule: tuple[str, ...]) -> None:
    trace, slab = write_trace(tmp_path / "trace.jsonl"), tmp_path / "slab"
    num_skipped = begin_and_kill(trace, slab, *schedule, at=NUM_REQUESTS // 2)
    assert NUM_REQUESTS // 2 <= num_skipped < NUM_REQUESTS
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    again = (str(trace), *TIERS, *schedule, "--disk-path", str(slab))
    done = run(*again, "--resume", "--json", str(file), "--report", str(page))
    report = json.loads(file.read_text(encoding="utf-8"))
    assert (report["requests"], report["wrong_bytes"], report["held_blocks"]) == (NUM_REQUESTS - num_skipped, 0, 0)
    assert (report["mismatches"], report["lost_blocks"]) == (0, 0)
    warm = report["warm_start"]
    assert (warm["skipped_requests"], warm["window_requests"]) == (num_skipped, 100)
    assert warm["restored_blocks"] > 300
    assert warm["rates"]["disk"] > 0.7
    assert warm["cold_rates"]["disk"] < 0.7
    assert warm["empty_rates"]["disk"] < 0.7
    text = page.read_text(encoding="utf-8")
    for part in ("Warm start", "First requests after the start", "blocks restored", f"{num_skipped:,}"):
        assert part in text
    assert "found in disk, first 100 requests after the start" in done.stdout
    assert not (slab / FILE_NAME).exists(), "there is nothing left to resume"


def test_ctrl_c_can_be_resumed_too_and_what_is_done_is_not_counted_again(tmp_path: Path) -> None:
    trace, slab, file = write_trace(tmp_path / "trace.jsonl"), tmp_path / "slab", tmp_path / "out.json"
    again = (str(trace), *TIERS, "--sequential", "--disk-path", str(slab), "--json", str(file))
    child = subprocess.Popen([*RUN, *again], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    give_up = time.monotonic() + 100
    while num_done(slab / FILE_NAME) < 10:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < give_up
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=100)
    assert child.returncode == 130
    first = json.loads(file.read_text(encoding="utf-8"))
    run(*again, "--resume")
    second = json.loads(file.read_text(encoding="utf-8"))
    assert first["requests"] + second["requests"] == NUM_REQUESTS
    assert first["requests"] == second["warm_start"]["skipped_requests"]
    hits, blocks = (first[name] + second[name] for name in ("hit_blocks", "blocks"))
    assert second["warm_start"]["whole_hit_rate"] == pytest.approx(hits / blocks)


def test_another_trace_or_size_or_a_fresh_start_is_refused_in_one_line(tmp_path: Path) -> None:
    trace, slab = write_trace(tmp_path / "trace.jsonl"), tmp_path / "slab"
    begin_and_kill(trace, slab, "--sequential", at=10)
    before = (slab / FILE_NAME).read_bytes()
    given = ("--sequential", "--disk-path", str(slab))
    other = tmp_path / "folder"
    other.mkdir()
    changed = write_trace(other / "trace.jsonl", NUM_REQUESTS - 1)
    for arguments, message in (
        ((str(trace), *TIERS, *given), f"of {NUM_REQUESTS:,} requests: give --resume to go on with it"),
        ((str(trace), *TIERS, *given[1:], "--resume"), "schedule was one request after the other and is 8 requests at"),
        (
            (str(trace), *TIERS[2:], "--device", "41", *given, "--resume"),
            "tiers was device 40, host 80, disk 800 blocks and",
        ),
        ((str(changed), *TIERS, *given, "--resume"), "requests was 240 and is 239, content was "),
        (("--sessions", "3", *TIERS, *given, "--resume"), "trace was trace.jsonl and is built-in conversations"),
    ):
        done = run(*arguments, status=2)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        assert message in done.stderr
    assert (slab / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume",), "--resume goes on with a replay in the directory of its disk tier: give --disk-path DIR too"),
        (("--disk", "100", "--resume"), "give --disk-path DIR too"),
        (("--disk", "100", "--disk-path", "absent", "--resume"), "there is nothing to resume in absent"),
        (("--remote", "ftp://x"), "an object store's URL begins with one of s3://"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run("--sessions", "1", *arguments, status=2)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert message in done.stderr


def test_an_object_store_is_a_tier_and_is_named_without_secrets(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    file = tmp_path / "out.json"
    tiers = ("--device", "300", "--remote", f"file://{tmp_path}/store", "--block-bytes", "64")
    done = run(*tiers, "--sessions", "5", "--turns", "3", "--sequential", "--json", str(file))
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["hit_rate_by_tier"]["remote"] > 0
    assert report["routes"]["device->remote"]["blocks"] > 0
    assert (report["wrong_bytes"], report["held_blocks"], report["warm_start"]) == (0, 0, None)
    assert f"device300blocks,file://{tmp_path}/store" in "".join(done.stdout.split())
    again = run(*tiers, "--remote", "s3://user:secret@bucket", status=2)
    assert "secret" not in again.stderr
