"""Describes the machine on which something is measured or run."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

import kvbm
from kvbm._backend import default_backend

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe_machine() -> dict[str, Any]:
    """Give processor, memory, kernel settings and versions as plain values."""
    backend = default_backend()
    return {
        "kvbm": kvbm.__version__,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "cpu_features": list(backend.cpu_features),
        "processor": _processor(),
        "cores": _num_cores(),
        "memory_bytes": _memory_nbytes(),
        "huge_pages": _huge_pages(),
        "memlock_bytes": _memlock_nbytes(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _num_cores() -> int:
    """Count the cores this process may use; where the system cannot say, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_nbytes() -> int | str:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return "not available"


def _memlock_nbytes() -> int | str | None:
    """Give the limit of locked memory; None is no limit."""
    if sys.platform == "win32":
        return "not available"
    import resource  # absent on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _huge_pages() -> str:
    try:
        setting = _HUGE_PAGES.read_text(encoding="utf-8")
    except OSError:
        return "not available"
    return setting.partition("[")[2].partition("]")[0] or setting.strip()
