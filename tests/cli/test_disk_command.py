"""``kvbm disk``: what it prints, its exit statuses, and that nothing changes unless it was asked for."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm._backend import default_backend
from kvbm.cli import main as cli
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage, OsCalls
from kvbm.storage.disk.format import RECORD_NBYTES, RECORDS_AT, VERSION, decode_header, encode_header

LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=100, num_layers=2, outer_dim=2, block_size=4, inner_dim=256, dtype="uint8"
)  # a block fills its slot of 4096
Run = Callable[..., tuple[str, str]]


def open_slab(directory: Path, name: str = "rank0") -> DiskStorage:
    return DiskStorage(LAYOUT, directory, name=name, fingerprint="kvbm-slab-v1; model=tiny; layers=2")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a directory with two slabs of 40 blocks."""
    for name in ("rank0", "rank1"):
        with open_slab(tmp_path / "disk", name) as storage:
            ids = np.arange(40, dtype=np.int32)
            data = np.random.default_rng(1).integers(0, 256, (40, 4096), dtype=np.uint8)
            hashes = np.arange(1, 81, dtype=np.uint64).reshape(40, 2)
            addresses = np.uint64(data.ctypes.data) + ids.astype(np.uint64) * np.uint64(4096)
            pieces = np.zeros(1, dtype=np.uint64)
            checksums = default_backend().checksum_blocks(addresses, pieces, 4096, hashes)
            storage.write(ids, data)
            storage.record(ids, hashes=hashes, checksums=checksums)
    return tmp_path / "disk"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command as `main` does; give what it wrote to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["kvbm", "disk", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert (ended.value.code or 0) == status, captured.out + captured.err
        return captured.out, captured.err

    return call


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def num_found(directory: Path, name: str = "rank0") -> int:
    with open_slab(directory, name) as storage:
        return len(storage.inventory()[0])


def test_inspect_shows_every_slab_or_the_one_that_is_named(run: Run, directory: Path) -> None:
    shown, _ = run("inspect", directory)
    assert [line.split()[1] for line in shown.splitlines() if line.strip().startswith("slab ")] == ["rank0", "rank1"]
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    for line in (
        "held by nobody",
        "fingerprint kvbm-slab-v1",
        "model=tiny",  # one part a line
        "layers=2",
        "blocks 40 in 100 slots, 40.0% occupied",
        "damaged records none",
        "bytes of a block 4,096 in a slot of 4,096",
    ):
        assert lines.count(line) == 2, line
    for arguments in ((directory, "--slab", "rank1"), (directory / "rank1.index",)):
        shown, _ = run("inspect", *arguments, "--json")
        (slab,) = json.loads(shown)["slabs"]
        assert (slab["name"], slab["num_blocks"], slab["occupancy"], slab["problem"]) == ("rank1", 40, 0.4, "")
        assert slab["fingerprint"] == ["kvbm-slab-v1", "model=tiny", "layers=2"]
        assert sum(slab["used"].values()) == sum(slab["written"].values()) == slab["priorities"]["50"] == 40


def test_inspect_works_beside_the_owner_and_the_others_do_not(run: Run, directory: Path) -> None:
    with open_slab(directory):
        shown, _ = run("inspect", directory, "--slab", "rank0")
        assert f"process {os.getpid()}" in shown
        for command in (["verify"], ["clear", "--yes"]):
            _, said = run(*command, directory, "--slab", "rank0", status=2)
            assert f"this slab is held by process {os.getpid()}: stop it first" in said
        assert json.loads(run("verify", directory, "--json", status=2)[0])["slabs"][1]["num_blocks"] == 40
        run("clear", "--yes", directory, status=2)  # all of them or none
    assert (num_found(directory), num_found(directory, "rank1")) == (40, 40)


def test_what_came_from_a_file_does_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    DiskStorage(LAYOUT, tmp_path / "disk", fingerprint="model=\x1b[31m[red]x").close()
    shown, _ = run("inspect", tmp_path / "disk")
    assert "model=\\x1b[31m[red]x" in shown


def test_verify_finds_what_is_bad_and_drops_it_when_asked(run: Run, directory: Path) -> None:
    shown, said = run("verify", directory)
    assert (shown.count("all good"), said) == (2, "")
    flip(directory / "rank0.blocks", 7 * 4096 + 4095)
    flip(directory / "rank0.index", RECORDS_AT + 9 * RECORD_NBYTES)
    shown, _ = run("verify", directory, status=1)
    assert "1 blocks differ from their checksum, 0 cannot be read, 1 records are damaged" in shown
    assert "bad slots: 7\n" in shown
    assert "--drop forgets them now" in shown
    bad, good = json.loads(run("verify", directory, "--json", "--threads", "1", status=1)[0])["slabs"]
    assert bad["bad"] == [
        {"slot": 7, "hash": f"{(15).to_bytes(8, 'little').hex()}{16:02x}{'00' * 7}", "reason": "mismatch"}
    ]
    assert (bad["num_blocks"], bad["num_bad"], bad["num_damaged"], bad["num_dropped"]) == (39, 1, 1, 0)
    assert (good["num_blocks"], good["num_bad"], good["nbytes"]) == (40, 0, 40 * 4096)
    assert "2 records dropped" in run("verify", directory, "--drop", status=1)[0]
    assert run("verify", directory)[0].count("all good") == 2
    assert num_found(directory) == 38


def test_ctrl_c_leaves_the_slab_as_it_was(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(directory / "rank0.blocks", 0)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    read = OsCalls.preadv

    def interrupt(self: OsCalls, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if memoryview(buffers[0]).nbytes == 40 * 4096:  # the blocks, in a thread of its own
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, fd, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(OsCalls, "preadv", interrupt)
        _, said = run("verify", directory, "--drop", status=130)
    assert "interrupted: nothing was changed" in said
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    run("verify", directory, status=1)  # and it is free again


def test_a_data_file_that_is_gone_is_a_problem_of_that_slab_only(run: Run, directory: Path) -> None:
    (directory / "rank0.blocks").unlink()
    shown, said = run("verify", directory, status=2)
    assert os.strerror(errno.ENOENT).lower() in said
    assert "rank1.index: 40 blocks read" in shown


def test_clear_forgets_everything_and_asks_before(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = run("clear", directory, status=2)
    assert "nobody is there to answer: give --yes" in said
    monkeypatch.setattr("kvbm.cli.disk.sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text, **_: text.startswith("forget 80 blocks of ") and False)
    assert "nothing was changed" in run("clear", directory, status=1)[0]
    assert (num_found(directory), num_found(directory, "rank1")) == (40, 40)
    assert "rank1.index: 40 blocks forgotten" in run("clear", directory, "--slab", "rank1", "--yes")[0]
    assert (num_found(directory), num_found(directory, "rank1")) == (40, 0)
    monkeypatch.setattr("typer.confirm", lambda text, **_: text.startswith("forget 40 blocks of "))
    run("clear", directory)
    assert num_found(directory) == 0


def test_headers_that_cannot_be_read_are_told_apart(run: Run, directory: Path) -> None:
    index = directory / "rank0.index"
    index.write_bytes(b"\0" * 9000)
    shown, _ = run("inspect", directory, status=2)
    assert "this slab has no header yet: it is empty" in shown
    assert "has no whole header: nothing in it is found anyway" in run("clear", directory, "--yes")[0]
    whole = encode_header(decode_header((directory / "rank1.index").read_bytes()[:4096]))
    foreign = whole[:8] + (VERSION + 1).to_bytes(4, "little") + whole[12:-4]
    from zlib import crc32

    index.write_bytes(foreign + crc32(foreign).to_bytes(4, "little"))
    for command in (["verify"], ["clear", "--yes"]):
        _, said = run(*command, directory, status=2)
        assert f"of version {VERSION + 1}" in said


@pytest.mark.parametrize("command", ["inspect", "verify", "clear"])
def test_a_wrong_path_is_one_line(run: Run, tmp_path: Path, command: str) -> None:
    _, said = run(command, tmp_path, status=2)
    assert said.startswith("kvbm: ")
    assert said.count("\n") == 1
    assert "no slab is here" in said
