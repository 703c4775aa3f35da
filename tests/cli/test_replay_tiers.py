"""``kvbm replay`` over tiers as its user sees it: figures, page, schedule, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

RUN = [sys.executable, "-m", "kvbm.cli.main", "replay"]
TIERS = ("--device", "300", "--host", "500", "--disk", "2000", "--block-bytes", "64")
SMALL = ("--sessions", "12", "--turns", "3")


def run(*arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RUN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
        timeout=100,
        cwd=tempfile.gettempdir(),  # not the source tree, which Python 3.10 would import from
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def figures(file: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def test_three_tiers_all_hit_and_the_temporary_directory_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = run(*TIERS, *SMALL, "--sequential", "--json", str(file), TMPDIR=str(tmp_path))
    report = figures(file)
    assert set(report["hit_rate_by_tier"]) == {"device", "host", "disk"}
    assert all(report["hit_rate_by_tier"].values())
    assert sum(report["hit_rate_by_tier"].values()) == pytest.approx(report["hit_rate"])
    assert (report["wrong_bytes"], report["held_blocks"], report["refused"]) == (0, 0, 0)
    assert set(report["routes"]) == {"device->host", "host->device", "host->disk", "disk->device"}
    assert "device 300, host 500, disk 2,000 blocks" in " ".join(done.stdout.split())
    for text in ("found in disk", "host->disk, blocks / bytes"):
        assert text in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_two_sequential_runs_print_the_same_and_a_given_directory_stays(tmp_path: Path) -> None:
    seen = []
    for name in ("one", "two"):
        folder, file = tmp_path / name, tmp_path / f"{name}.json"
        folder.mkdir()
        run(*TIERS, *SMALL, "--sequential", "--disk-path", str(folder), "--json", str(file))
        assert list(folder.iterdir())
        report = figures(file)
        seen.append({key: report[key] for key in ("hit_rate_by_tier", "routes", "evictions_by_tier", "hit_blocks")})
    assert seen[0] == seen[1]


def test_requests_at_once_and_by_the_clock_serve_them_all(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    for schedule in (("--concurrency", "4"), ("--clock", "real", "--speed", "1e6")):
        run(*TIERS, *SMALL, *schedule, "--json", str(file))
        report = figures(file)
        assert (report["requests"], report["no_room"], report["wrong_bytes"]) == (36, 0, 0)


def test_the_page_is_written_with_what_was_asked_for(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    run(*TIERS, *SMALL, "--report", str(page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    for part in (
        "built-in conversations",
        "8 requests at once, virtual clock",
        "12, 3, 0",
        "Hit rate against capacity",
    ):
        assert part in text


def test_a_trace_is_replayed_in_order_of_time_and_with_blocks_of_any_size(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.jsonl", tmp_path / "out.json"
    lines = [{"timestamp": 1000 - i, "hash_ids": list(range(i % 7 + 1))} for i in range(60)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(str(trace), "--device", "9", "--host", "20", "--block-bytes", "100", "--json", str(file))
    report = figures(file)
    assert (report["requests"], report["wrong_bytes"]) == (60, 0)
    assert report["written_bytes"] + report["verified_bytes"] == report["blocks"] * 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sequential", "--concurrency", "2"), "--sequential runs one request after the other: leave"),
        (("--sequential", "--clock", "real"), "--sequential runs one request after the other: leave"),
        (("--speed", "2"), "--speed 2 has no meaning with a virtual clock: give --clock real too"),
        (("--clock", "real", "--speed", "0"), "--speed 0 is impossible, give more than 0"),
        (("--block-bytes", "100"), "does not divide by the 16 tokens of a block of the built-in conversations: give"),
        (("--report", "/nowhere/x.html"), "--report /nowhere/x.html cannot be written: No such file or directory"),
        (("--disk-path", "."), "--disk-path . has no meaning without a disk tier: give --disk N too"),
        (("--disk", "20000", "--disk-path", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run("--sessions", "1", *arguments, status=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_disk_without_room_is_refused_in_one_line(tmp_path: Path) -> None:
    sizes = ("--disk", "2000000000", "--block-bytes", "1048576", "--disk-path", str(tmp_path))
    done = run("--device", "4", *sizes, status=2)
    assert done.stderr.startswith("kvbm: ")
    assert "space" in done.stderr.lower() or "room" in done.stderr.lower() or "large" in done.stderr.lower()


def test_without_matplotlib_a_page_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = run("--report", str(tmp_path / "x.html"), status=2, PYTHONPATH=path)
    assert "pip install 'kvbm-native[report]'" in done.stderr
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("schedule", [("--sequential",), ("--concurrency", "3")])
def test_ctrl_c_prints_what_there_is_and_removes_the_temporary_directory(
    tmp_path: Path, schedule: tuple[str, ...]
) -> None:
    trace, files = tmp_path / "trace.jsonl", tmp_path / "tmp"
    files.mkdir()
    trace.write_text("".join(json.dumps({"hash_ids": list(range(i, i + 50))}) + "\n" for i in range(40_000)))
    page, file = tmp_path / "part.html", tmp_path / "part.json"
    tiers = ("--device", "200", "--host", "300", "--disk", "900", "--block-bytes", "64")
    child = subprocess.Popen(
        [*RUN, str(trace), *tiers, *schedule, "--json", str(file), "--report", str(page)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "KVBM_BACKEND": "pure", "FORCE_COLOR": "1", "TMPDIR": str(files)},
        cwd=tmp_path,
    )
    assert child.stderr is not None
    assert "replaying" in child.stderr.readline() + child.stderr.read(20)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=100)
    assert child.returncode == 130
    assert "interrupted" in output
    report = figures(file)
    assert report["is_partial"]
    assert report["requests"] < 40_000
    assert "Interrupted" in page.read_text(encoding="utf-8")
    assert not list(files.iterdir())
