"""Places memory on the NUMA node next to a GPU, where the system knows one.

A copy from the far node crosses the link between processors and loses a third of its speed. Where the node is not
known, or the kernel refuses, memory lies where it is first touched.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
from pathlib import Path

_log = logging.getLogger("kvbm.gpu")

_PCI = Path("/sys/bus/pci/devices")
_MBIND = {"x86_64": 237, "aarch64": 235}  # glibc has no mbind, libnuma may be absent
_MPOL_PREFERRED = 1  # rather the other node than none
_NODE_BITS = 1024


def numa_node_of(pci_bus_id: str, *, root: Path = _PCI) -> int | None:
    """Give the NUMA node of a PCI device, None where the system tells none.

    Parameters
    ----------
    pci_bus_id : str
        As CUDA gives it, e.g. ``0000:3B:00.0``.
    root : Path
        Where the system lists its PCI devices.
    """
    try:
        node = int((root / pci_bus_id.lower() / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer_node(address: int, nbytes: int, node: int) -> bool:
    """Ask the kernel to take pages that are not touched yet from a node.

    Parameters
    ----------
    address : int
        Of a page.
    nbytes : int
    node : int

    Returns
    -------
    bool
        Whether the kernel took it; memory is as good as before where it did not.
    """
    number = _MBIND.get(platform.machine())
    if number is None or not sys.platform.startswith("linux") or not 0 <= node < _NODE_BITS:
        return False
    words = (ctypes.c_ulong * (_NODE_BITS // (8 * ctypes.sizeof(ctypes.c_ulong))))()
    width = 8 * ctypes.sizeof(ctypes.c_ulong)
    words[node // width] = 1 << (node % width)
    libc = ctypes.CDLL(None, use_errno=True)
    answer: int = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_size_t(nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        words,
        ctypes.c_ulong(_NODE_BITS + 1),  # the kernel looks at one bit less than it is told
        ctypes.c_uint(0),
    )
    if answer != 0:
        _log.info("memory was not placed node=%d nbytes=%d errno=%d", node, nbytes, ctypes.get_errno())
    return answer == 0
