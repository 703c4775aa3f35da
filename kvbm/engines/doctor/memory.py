"""Host memory: whether the tier fits into this machine, huge pages, and the limit of locked memory."""

from __future__ import annotations

import re
from pathlib import Path

from kvbm.bench.machine import describe_machine
from kvbm.engines.doctor.findings import Finding, State, show_nbytes
from kvbm.engines.doctor.setup import Setup
from kvbm.errors import KvbmError
from kvbm.gpu import find_gpu

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def check_host_memory(
    nbytes: int | None, *, meminfo: Path = _MEMINFO, limit: Path = _CGROUP_LIMIT, used: Path = _CGROUP_USED
) -> list[Finding]:
    """Compare the host tier with the memory of this machine, and of this container.

    Parameters
    ----------
    nbytes : int, optional
        Of all ranks and groups of layers together; None where it cannot be told.
    meminfo, limit, used : Path
        Files of the system.
    """
    if nbytes is None:
        return []
    values = {key: int(value) << 10 for key, value in re.findall(r"(\w+): +(\d+) kB", _read(meminfo))}
    total, available = values.get("MemTotal"), values.get("MemAvailable")
    if total is None or available is None:
        return [
            Finding("host memory", State.NOTE, f"{show_nbytes(nbytes)} wanted; this system does not say what it has")
        ]
    where, bound = "this machine", _read(limit).strip()
    if bound.isdigit() and int(bound) < total:
        where, total = "this container", int(bound)
        available = min(available, total - int(_read(used).strip() or 0))
    text = f"{show_nbytes(nbytes)} wanted, {where} has {show_nbytes(available)} of {show_nbytes(total)} free"
    if nbytes > total:
        return [Finding("host memory", State.UNSAFE, text, "make the host tier smaller: the engine would be killed")]
    if nbytes > available:
        advice = "make the host tier smaller, or stop what uses the memory (an engine that runs here counts)"
        return [Finding("host memory", State.WARNING, text, advice)]
    return [Finding("host memory", State.OK, text)]


def check_pages(setup: Setup, *, huge_pages: str | None = None) -> Finding:
    """Look whether the host tier gets huge pages.

    Parameters
    ----------
    setup : Setup
    huge_pages : str, optional
        Default: what the kernel says.
    """
    huge_pages = describe_machine()["huge_pages"] if huge_pages is None else huge_pages
    if setup.sections.get("host", {}).get("huge_pages") is False:
        return Finding("huge pages", State.NOTE, "host.huge_pages is false: none are asked for")
    if huge_pages == "never":
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or set host.huge_pages to false"
        return Finding("huge pages", State.WARNING, "the kernel gives none (never)", advice)
    return Finding("huge pages", State.OK if huge_pages in ("always", "madvise") else State.NOTE, huge_pages)


def check_memlock(nbytes: int | None, *, limit: int | str | None = "", has_gpu: bool | None = None) -> Finding:
    """Look whether the host tier may be locked, as copies to and from a GPU want it.

    Parameters
    ----------
    nbytes : int, optional
        Of the host tier of all ranks.
    limit : int, str or None
        Bytes, None where there is none, text where it cannot be told; default: what holds here.
    has_gpu : bool, optional
        Default: whether there is one.
    """
    limit = describe_machine()["memlock_bytes"] if limit == "" else limit
    shown = "unlimited" if limit is None else show_nbytes(limit) if isinstance(limit, int) else str(limit)
    if not (_has_gpu() if has_gpu is None else has_gpu):
        return Finding("memlock", State.OK, f"{shown}; without a GPU none is needed")
    if isinstance(limit, int) and nbytes is not None and limit < nbytes:
        advice = "ulimit -l unlimited, in a container --ulimit memlock=-1, with systemd LimitMEMLOCK=infinity"
        return Finding("memlock", State.WARNING, f"{shown}, the host tier has {show_nbytes(nbytes)}", advice)
    return Finding("memlock", State.OK, shown)


def _has_gpu() -> bool:
    try:
        return find_gpu() is not None
    except KvbmError:
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
