"""Describes the machine on which something is measured or run."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any

import numpy as np

import kvbm
from kvbm._backend import default_backend

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe_machine() -> dict[str, Any]:
    """Give processor, memory, kernel settings and versions as plain values."""
    backend = default_backend()
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "kvbm": kvbm.__version__,
        "backend": backend.name,
        "backend_reason": backend.reason,
        "cpu_features": list(backend.cpu_features),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": _huge_pages(),
        "memlock_bytes": None if memlock == resource.RLIM_INFINITY else memlock,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


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
