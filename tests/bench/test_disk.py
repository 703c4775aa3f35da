"""``kvbm bench disk``: what fio is asked and answers, our side, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kvbm._backend import Backend, load_backend
from kvbm.bench import disk, fio
from kvbm.bench.disk_site import Site, open_site
from kvbm.bench.report import BARS
from kvbm.bench.restart import restart_row
from kvbm.cli.main import app
from kvbm.errors import ConfigError, TransferError
from kvbm.storage.disk import DiskStorage
from kvbm.types import IdArray

MIB = 1 << 20
TASK = fio.FioRun(
    file=Path("/there/a:b"), is_read=False, block_nbytes=MIB, nbytes=8 * MIB, file_nbytes=32 * MIB, depth=4, offset=MIB
)
SPEEDS = {name for name in disk.ROWS if name != "restart_1m"}

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")


def options_of(task: fio.FioRun, engine: str) -> dict[str, str]:
    return dict(
        (argument.lstrip("-") + "=").split("=")[:2]  # type: ignore[misc]
        for argument in fio.fio_arguments(task, engine)
    )


# -- fio -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nbytes", "depth"), [(8 * MIB, 4), (8 * MIB, 1), (8 * MIB, 16), (7 * MIB, 4), (MIB, 4)])
def test_threads_of_psync_write_parts_that_do_not_meet(nbytes: int, depth: int) -> None:
    options = options_of(replace(TASK, nbytes=nbytes, depth=depth), "psync")
    share, num_threads = int(options["io_size"]), int(options["numjobs"])
    assert share >= MIB
    assert share % MIB == 0
    assert int(options.get("offset_increment", share)) == int(options["size"]) == share
    assert num_threads <= depth
    assert nbytes - num_threads * MIB < share * num_threads <= nbytes
    assert options["iodepth"] == "1"


def test_io_uring_has_one_thread_and_the_depth() -> None:
    options = options_of(TASK, "io_uring")
    assert (options["numjobs"], options["iodepth"], options["io_size"]) == ("1", "4", str(8 * MIB))
    assert (options["rw"], options["offset"], options["direct"]) == ("write", str(MIB), "1")
    assert options["filename"] == r"/there/a\:b"


def test_reads_go_all_over_the_file() -> None:
    options = options_of(replace(TASK, is_read=True, is_direct=False), "psync")
    assert (options["rw"], options["filesize"], options["direct"]) == ("randread", str(32 * MIB), "0")
    assert "offset" not in options
    assert "size" not in options


def report(**changes: object) -> str:
    job = {
        "write": {"bw_bytes": 5e8},
        "read": {"bw_bytes": 7e8},
        "usr_cpu": 10.0,
        "sys_cpu": 15.0,
        "job_runtime": 4000,
        "error": 0,
    }
    return "note: a line before\n" + json.dumps({"jobs": [{**job, **changes}]})


def test_report_gives_speed_and_processor_time() -> None:
    assert fio.read_report(report(), is_read=False) == (5e8, 1.0)
    assert fio.read_report(report(), is_read=True)[0] == 7e8


@pytest.mark.parametrize("text", ["", "no JSON {", "{}", '{"jobs": []}', '{"jobs": [{"write": 1}]}', '{"jobs": 1}'])
def test_report_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="fio answered what is no report"):
        fio.read_report(text, is_read=False)


@pytest.mark.parametrize("changes", [{"error": 5}, {"write": {"bw_bytes": 0}}])
def test_report_of_a_failure_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="fio moved nothing or failed with error"):
        fio.read_report(report(**changes), is_read=False)


def put_fio(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = folder / "fio"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin:/bin")


def test_missing_fio_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs fio to compare with: install it \(Debian, Ubuntu: apt install fio\)"):
        disk.run(disk.Extent(path=tmp_path))
    assert not list(tmp_path.iterdir())


def test_failure_of_fio_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_fio(tmp_path, "echo first >&2; echo the last word >&2; exit 3", monkeypatch)
    with pytest.raises(ConfigError, match="fio failed with psync: the last word"):
        fio.run_fio(replace(TASK, file=tmp_path / "x"), "psync")


def test_buffers_of_fio_lie_in_huge_pages_as_ours_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    put_fio(tmp_path, 'echo "$GLIBC_TUNABLES" >&2; exit 1', monkeypatch)
    with pytest.raises(ConfigError, match=r"check=0:glibc\.malloc\.hugetlb=1$"):
        fio.run_fio(replace(TASK, file=tmp_path / "x"), "psync")
    assert options_of(TASK, "psync")["iomem_align"] == str(2 * MIB)


def test_fio_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_fio(tmp_path, "exec sleep 100", monkeypatch)
    monkeypatch.setattr(fio, "_SLACK_S", 0.01)
    with pytest.raises(ConfigError, match="fio did not end within 0 s: is the disk well"):
        fio.run_fio(replace(TASK, file=tmp_path / "x", nbytes=4096), "psync")


# -- our side --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "slab"


def test_what_was_written_is_read_from_random_slots(backend: Backend, folder: Path) -> None:
    with open_site(folder, 64 << 10, nbytes=2 * MIB, turn_nbytes=MIB, backend=backend) as site:
        assert (site.num_blocks, site.turn_blocks, site.block_nbytes) == (32, 16, 64 << 10)
        site.fill()
        for _ in range(3):
            for speed, cpu_s in (site.write(), site.read()):
                assert speed > 0
                assert cpu_s > 0
            site.check()


def test_a_wrong_byte_is_noticed(folder: Path) -> None:
    with open_site(folder, 64 << 10, nbytes=2 * MIB, turn_nbytes=MIB, backend=load_backend("pure")) as site:
        site.fill()
        site.read()
        site._memory[site.turn_blocks + 3, -1] ^= np.uint64(1)
        with pytest.raises(TransferError, match="came back with other bytes than were written"):
            site.check()


def test_a_block_that_does_not_arrive_is_an_error(folder: Path) -> None:
    with open_site(folder, 64 << 10, nbytes=2 * MIB, turn_nbytes=MIB, backend=load_backend("pure")) as site:
        site.fill()
        site._hashes[:] += np.uint64(1)
        with pytest.raises(TransferError, match="a block did not arrive: checksum mismatch"):
            site.read()


# -- rows ------------------------------------------------------------------------------------------------------


def test_rows_of_speeds_have_bars_and_processor_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "find_fio", lambda: "fio")
    monkeypatch.setattr(disk, "run_fio", lambda task, engine: (1e9 + task.is_read, 0.5))
    extent = disk.Extent(path=tmp_path, nbytes=8 * MIB, turn_nbytes=4 * MIB, rounds=2, rows=sorted(SPEEDS))
    rows = {row["name"]: row for row in disk.run(extent)}
    assert set(rows) == SPEEDS | {f"{name}_cpu" for name in SPEEDS}
    assert SPEEDS | {"restart_1m"} <= set(BARS)
    for name in SPEEDS:
        row, cpu_row = rows[name], rows[f"{name}_cpu"]
        assert row["median"] > 0
        assert row["ratio"] > 0
        assert row["fio"][cpu_row["engine"]] == row["reference"] == max(row["fio"].values())
        assert row["depth"] == 4
        assert cpu_row["unit"] == "ms/GiB"
    assert not list(tmp_path.iterdir())


def test_turns_alternate_and_the_best_engine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    speeds = {"psync": 2e9, "io_uring": 4e9}

    def run_fio(task: fio.FioRun, engine: str) -> tuple[float, float]:
        turns.append(engine)
        return speeds[engine], 0.5

    def read(site: Site) -> tuple[float, float]:
        turns.append("ours")
        return 1e9, 0.25

    monkeypatch.setattr(disk, "find_fio", lambda: "fio")
    monkeypatch.setattr(disk, "run_fio", run_fio)
    monkeypatch.setattr(Site, "read", read)
    extent = disk.Extent(path=tmp_path, nbytes=8 * MIB, turn_nbytes=MIB, rounds=3, rows=("read_64k",))
    row, cpu_row = disk.run(extent)
    assert (row["median"], row["reference"], row["ratio"]) == (1.0, 4.0, 0.25)
    assert row["fio"] == {"psync": 2.0, "io_uring": 4.0}
    assert (cpu_row["engine"], cpu_row["median"], cpu_row["ratio"]) == ("io_uring", 0.25 * 1000 * 1024, 2.0)
    rounds = [turns[start : start + 3] for start in range(len(turns) - 12, len(turns), 3)]
    assert all(sorted(order) == ["io_uring", "ours", "psync"] for order in rounds)
    assert len({order[0] for order in rounds}) == 3


def test_an_engine_that_the_kernel_forbids_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_fio(task: fio.FioRun, engine: str) -> tuple[float, float]:
        if engine == "io_uring":
            raise ConfigError("fio failed with io_uring: operation not permitted")
        return 1e9, 0.5

    monkeypatch.setattr(disk, "find_fio", lambda: "fio")
    monkeypatch.setattr(disk, "run_fio", run_fio)
    extent = disk.Extent(path=tmp_path, nbytes=8 * MIB, turn_nbytes=MIB, rounds=1, rows=("read_64k",))
    assert list(disk.run(extent)[0]["fio"]) == ["psync"]


def test_restart_finds_every_record(backend: Backend, tmp_path: Path) -> None:
    row = restart_row(tmp_path / "slab", 1000, 2, backend)
    assert row["name"] == "restart_1m"
    assert 0 < row["median"] < 10
    assert not list(tmp_path.iterdir())


def test_restart_that_loses_records_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(storage: DiskStorage, block_ids: IdArray, **fields: Any) -> None:
        write(storage, block_ids[:-1], **{name: values[:-1] for name, values in fields.items()})

    write = DiskStorage.record
    monkeypatch.setattr(DiskStorage, "record", record)
    with pytest.raises(RuntimeError, match="99 of 100 records were found"):
        restart_row(tmp_path / "slab", 100, 1, load_backend("pure"))


# -- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["disk", "--rows", "write_64k,x"], "there is no row x, use write_64k, read_64k, write_1m"),
        (["disk", "--rows", " , "], "there is no row given"),
        (["disk", "--size", "2G"], "'2G' is no size"),
        (["disk", "--size", "0", "--rows", "restart_1m"], "--size is 0 bytes, give at least"),
        (["disk", "--path", "/absent/folder", "--rows", "restart_1m"], "/absent/folder is no directory"),
        (["disk", "--size", "900PiB"], r"need \d+ bytes in .*give a smaller --size or another"),
        (
            ["hash", "--rows", "x", "--path", "."],
            "--path is for kvbm bench disk alone; --rows is for kvbm bench disk and gpu alone",
        ),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "find_fio", lambda: "fio")
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert re.search(message, str(result.exception))


@needs_fio
def test_fio_and_we_move_the_same_blocks(tmp_path: Path) -> None:
    extent = disk.Extent(path=tmp_path, nbytes=8 * MIB, turn_nbytes=4 * MIB, rounds=1, rows=("write_1m", "read_1m"))
    rows = [row for row in disk.run(extent) if "fio" in row]
    assert [row["name"] for row in rows] == ["write_1m", "read_1m"]
    assert all(speed > 0 for row in rows for speed in row["fio"].values())
    assert all("psync" in row["fio"] for row in rows)


def test_command_writes_its_options_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "find_fio", lambda: "fio")
    monkeypatch.setattr(disk, "run_fio", lambda task, engine: (1e9, 0.5))
    file = tmp_path / "figures.json"
    arguments = ["disk", "--path", str(tmp_path), "--size", "8MiB", "--rows", "write_1m", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.exception
    answer = json.loads(file.read_text())
    assert answer["command"] == f"kvbm bench disk --path {tmp_path} --size 8MiB --rows write_1m"
    assert [row["name"] for row in answer["rows"]] == ["write_1m", "write_1m_cpu"]
    assert "write_1m" in result.stdout
