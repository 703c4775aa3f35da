"""fio, the measure of a disk: runs one job file's worth of it in a child process and reads what it says.

Its files lie where it is told to work, and are left to whoever made the directory. Without state.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.errors import ConfigError

ENGINES = ("psync", "io_uring")
_HUGE_PAGE_NBYTES = 2 << 20
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # of fio's buffers, as our memory has them: worth 1.5 times at 1 MiB and more
_SLACK_S = 60.0  # what it may take beyond a transfer at _SLOWEST
_SLOWEST = 4 << 20  # bytes a second


@dataclass(frozen=True)
class FioRun:
    """What fio is to do.

    Attributes
    ----------
    file : Path
        Made by fio, of `file_nbytes`, where it is absent.
    is_read : bool
        Read blocks in a random order; otherwise write them one behind the other.
    block_nbytes : int
    nbytes : int
        To be moved, or a few blocks less, so that every thread has as many.
    offset : int
        First byte of the file that is written, or read; a multiple of 4096.
    file_nbytes : int
    depth : int
        Blocks under way at once: threads of psync, entries of io_uring.
    is_direct : bool
        Go around the page cache.
    """

    file: Path
    is_read: bool
    block_nbytes: int
    nbytes: int
    file_nbytes: int
    depth: int
    offset: int = 0
    is_direct: bool = True


def find_fio() -> str:
    """Give the path of the command.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    command = shutil.which("fio")
    if command is None:
        raise ConfigError("kvbm bench disk needs fio to compare with: install it (Debian, Ubuntu: apt install fio)")
    return command


def fio_arguments(run: FioRun, engine: str) -> list[str]:
    """Give the arguments of one run with one of `ENGINES`.

    Notes
    -----
    psync has a thread for each block under way; each writes a part of the file, or reads all over it. io_uring has one
    thread.
    """
    num_threads = max(1, min(run.depth, run.nbytes // run.block_nbytes)) if engine == "psync" else 1
    share = run.nbytes // num_threads // run.block_nbytes * run.block_nbytes
    arguments = [
        "--name=kvbm",
        f"--filename={str(run.file).replace(':', chr(92) + ':')}",
        f"--rw={'randread' if run.is_read else 'write'}",
        f"--bs={run.block_nbytes}",
        f"--filesize={run.file_nbytes}",
        f"--direct={int(run.is_direct)}",
        f"--ioengine={engine}",
        f"--iodepth={1 if engine == 'psync' else run.depth}",
        f"--numjobs={num_threads}",
        f"--io_size={share}",
        "--thread",
        f"--iomem_align={_HUGE_PAGE_NBYTES}",
        "--fallocate=none",
        "--allow_file_create=0",
        "--invalidate=0",
        "--group_reporting",
        "--eta=never",
        "--output-format=json",
    ]
    if run.is_read:
        arguments += ["--norandommap", "--randrepeat=0"]
    else:
        arguments += [f"--offset={run.offset}", f"--size={share}"]
        if num_threads > 1:
            arguments.append(f"--offset_increment={share}")
    return arguments


def run_fio(run: FioRun, engine: str) -> tuple[float, float]:
    """Run fio once.

    Parameters
    ----------
    run : FioRun
    engine : str
        One of `ENGINES`.

    Returns
    -------
    speed, cpu_s : float
        Bytes a second, and seconds of processor time, its own and the kernel's for it.

    Raises
    ------
    ConfigError
        fio is not installed, fails, or answers something else.
    """
    command = [find_fio(), *fio_arguments(run, engine)]
    timeout_s = _SLACK_S + run.nbytes / _SLOWEST
    tunables = [text for text in (os.environ.get("GLIBC_TUNABLES"), _HUGE_PAGES) if text]
    environment = {**os.environ, "GLIBC_TUNABLES": ":".join(tunables)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=run.file.parent,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"fio did not end within {timeout_s:.0f} s: is the disk well?") from None
    if done.returncode:
        raise ConfigError(f"fio failed with {engine}: {_last_line(done.stderr or done.stdout)}")
    return read_report(done.stdout, is_read=run.is_read)


def read_report(text: str, *, is_read: bool) -> tuple[float, float]:
    """Read the JSON that fio prints; see `run_fio`."""
    try:
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        side = job["read" if is_read else "write"]
        # Its processor figures are shares of the run times of all threads together.
        cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        error, speed = job["error"], float(side["bw_bytes"])
    except (ValueError, LookupError, TypeError) as reason:
        raise ConfigError(f"fio answered what is no report of its version 3: {reason!r}") from reason
    if error or not speed:
        raise ConfigError(f"fio moved nothing or failed with error {error}")
    return speed, cpu_s


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
