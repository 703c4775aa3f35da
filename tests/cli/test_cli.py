"""The command as its user sees it: figures, files, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kvbm.cli import main as cli

RUN = [sys.executable, "-m", "kvbm.cli.main"]


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


def test_replay_prints_a_table_and_writes_the_promised_fields(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = run("replay", "--device", "500", "--sessions", "20", "--sequential", "--json", str(file))
    assert "hit rate" in done.stdout
    report = json.loads(file.read_text())
    assert {
        *("requests", "blocks", "hit_blocks", "hit_rate", "hit_rate_by_tier", "refused", "wrong_bytes", "seconds")
    } <= set(report)
    assert (report["requests"], report["wrong_bytes"]) == (100, 0)
    assert report["hit_rate_by_tier"] == {"device": report["hit_rate"]}


@pytest.mark.parametrize("backend", ["native", "pure"])
def test_replay_of_a_trace_is_the_same_on_both_twins(tmp_path: Path, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("kvbm._native.store", reason="the pure package has one twin only")
    trace, file = tmp_path / "trace.jsonl", tmp_path / "out.json"
    trace.write_text("".join(json.dumps({"hash_ids": [0, 1, i]}) + "\n" for i in range(2, 12)))
    run("replay", str(trace), "--device", "8", "--block-bytes", "100", "--backend", backend, "--json", str(file))
    report = json.loads(file.read_text())
    assert (report["blocks"], report["hit_blocks"], report["evictions"]) == (30, 18, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere.jsonl",), "/nowhere.jsonl: cannot be read: No such file or directory"),
        (("--device", "0"), "at least one tier, got none"),
        (("--policy", "mru"), "device.eviction is 'mru', did you mean lru? give one of fifo, lru"),
        (("--block-bytes", "0"), "--block-bytes 0 is impossible, give 1 or more"),
        (("--backend", "gpu"), "'gpu' is not known, use auto, native or pure"),
        (("--sessions", "1", "--json", "/nowhere/x.json"), "--json /nowhere/x.json cannot be written"),
    ],
)
def test_wrong_input_is_one_line_and_status_two(arguments: tuple[str, ...], message: str) -> None:
    done = run("replay", *arguments, status=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("kvbm: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_trace_cut_off_in_a_line_names_the_line(tmp_path: Path) -> None:
    trace = tmp_path / "cut.jsonl"
    trace.write_text('{"hash_ids": [1]}\n{"hash_ids": [1, 2')
    done = run("replay", str(trace), status=2)
    assert "cut.jsonl, line 2: not a whole JSON object" in done.stderr
    assert "give --requests 1" in done.stderr
    run("replay", str(trace), "--requests", "1")


@pytest.mark.usefixtures("cpu_device")  # whose storage is spoilt
def test_wrong_bytes_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from kvbm.storage import DeviceStorage

    read = DeviceStorage.read

    def flip(self: Any, block_ids: Any) -> Any:
        data = read(self, block_ids)
        data[:, :1] ^= 1
        return data

    monkeypatch.setattr(DeviceStorage, "read", flip)
    monkeypatch.setattr(sys, "argv", ["kvbm", "replay", "--sessions", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert "wrong bytes, first in block" in captured.err


@pytest.mark.parametrize("command", [("replay",), ("bench", "hash")])
def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    for file, reason in ((tmp_path, "Is a directory"), (tmp_path / "absent" / "x.json", "No such file or directory")):
        done = run(*command, "--json", str(file), status=2)
        assert (done.stdout, done.stderr) == ("", f"kvbm: --json {file} cannot be written: {reason}\n")
    assert not list(tmp_path.iterdir())


def test_brackets_in_a_file_name_are_shown_as_they_are(tmp_path: Path) -> None:
    trace = tmp_path / "[red]x.jsonl"
    trace.write_text('{"hash_ids": [1]}\n')
    assert "[red]x.jsonl, 4 blocks" in run("replay", str(trace), "--device", "4").stdout


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("std::bad_alloc"), "not enough memory (std::bad_alloc): give fewer or smaller blocks"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr("kvbm.cli.replay.BlockManager", refuse)
    monkeypatch.setattr(sys, "argv", ["kvbm", "replay", "--sessions", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kvbm: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_ctrl_c_prints_what_there_is_and_leaves(tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    arguments = ["replay", "--sessions", "3000", "--turns", "20", "--device", "200", "--json", str(file)]
    pipe = tmp_path / "trace.jsonl"
    pipe.write_text("".join(json.dumps({"hash_ids": list(range(i, i + 100))}) + "\n" for i in range(40_000)))
    child = subprocess.Popen(
        [*RUN, arguments[0], str(pipe), *arguments[5:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "KVBM_BACKEND": "pure", "FORCE_COLOR": "1"},
        cwd=tmp_path,
    )
    assert child.stderr is not None
    assert "replaying" in child.stderr.readline() + child.stderr.read(20)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=100)
    assert child.returncode == 130
    assert "interrupted" in output
    report = json.loads(file.read_text())
    assert report["is_partial"]
    assert report["requests"] < 40_000


def test_info_tells_the_twin_and_the_machine() -> None:
    facts = json.loads(run("info", "--json", KVBM_BACKEND="pure").stdout)
    assert (facts["backend"], facts["backend_reason"]) == ("pure", "asked for")
    assert {"cpu_features", "huge_pages", "memlock_bytes", "device", "optional_parts", "limits", "plugins"} <= set(
        facts
    )
    assert "backend reason" in run("info").stdout


def test_info_tries_out_a_directory_for_a_disk_tier_and_leaves_nothing(tmp_path: Path) -> None:
    disk = json.loads(run("info", "--json", "--disk-path", str(tmp_path)).stdout)["disk"]
    assert disk["engine"] in ("uring", "threads", "python")
    assert disk["io_mode"] in ("direct", "buffered")
    assert disk["directory"] == str(tmp_path)
    assert all(disk[name] for name in ("io_uring", "engine_reason", "io_mode_reason", "alignment", "preallocation"))
    assert not list(tmp_path.iterdir())
    pure = json.loads(run("info", "--json", "--disk-path", str(tmp_path), KVBM_BACKEND="pure").stdout)["disk"]
    assert pure["engine"] == "python"
    assert "native twin is absent" in pure["io_uring"]
    assert list(json.loads(run("info", "--json").stdout)["disk"]) == ["io_uring"]
    gone = run("info", "--disk-path", str(tmp_path / "absent"), status=2)
    assert "cannot try out a disk tier here (no such file or directory)" in gone.stderr
    assert gone.stderr.count("\n") == 1


def test_extras_that_info_names_are_those_of_the_package() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    parts = json.loads(run("info", "--json").stdout)["optional_parts"]
    for name, text in parts.items():
        extra = re.search(r"\(extra (\w+)\)$", text)
        if extra is None:
            assert text.endswith(f"(pip install {name})")
        else:
            assert re.search(rf'^{extra[1]} = \[.*"{name}>', project, re.MULTILINE), text


def test_bench_writes_machine_and_rows(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert "blake2b" in run("bench", "hash", "--json", str(file)).stdout
    answer = json.loads(file.read_text())
    assert answer["machine"]["cores"] >= 1
    for row in answer["rows"]:
        assert set(row) == {"name", "unit", "median", "spread", "reference", "ratio"}
    assert "there is no bench 'x', use store, hash, copy, tiers" in run("bench", "x", status=2).stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("kvbm ")
    for command in ("replay", "info", "bench"):
        assert "--help" in run(command, "--help").stdout
