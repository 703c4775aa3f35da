"""``kvbm info``: what is installed, which twin runs and why, and what this machine allows."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbm._backend import default_backend
from kvbm.bench.machine import describe_machine
from kvbm.errors import KvbmError, StorageError
from kvbm.gpu import describe_gpu, find_gpu
from kvbm.layout import BlockLayout
from kvbm.plugins import PLUGIN_KINDS, plugin_names
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk.calls import DIRECT_NBYTES
from kvbm.transfer.tuning import load_table

# Optional parts: module, what it is for, and the extra of kvbm-native that installs it ("" where none does).
_OPTIONAL = (
    ("prometheus_client", "kvbm.metrics", "metrics"),
    ("matplotlib", "kvbm replay --report", "report"),
    ("obstore", "the object store tier", "s3"),
    ("cuda.bindings", "streams and buffers of cuda-python", "cuda"),
    ("torch", "DLPack exchange of blocks", ""),
    ("xxhash", "tests of the checksum", "test"),
    ("hypothesis", "kvbm.testing", "test"),
    ("sphinx", "building the documentation", "docs"),
)

_PROBE_BLOCKS, _PROBE_BLOCK_NBYTES = 64, 64 << 10  # of the slab that is opened to see what a directory can do


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    disk_path: Annotated[
        Path | None, typer.Option(help="Try out this directory for a disk tier: 4 MiB, removed at once.")
    ] = None,
) -> None:
    """Show version, twin, processor features, memory settings, device, disk, optional parts, plug-ins and limits."""
    facts = _facts(disk_path)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(title="kvbm", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for what, value in facts.items():
        table.add_row(what.replace("_", " "), escape(_show(value)))
    Console().print(table)


def _facts(disk_path: Path | None) -> dict[str, Any]:
    return {
        **describe_machine(),
        "device": describe_gpu(),
        **_tuning(),
        "disk": {"io_uring": _io_uring()} if disk_path is None else {"io_uring": _io_uring(), **_try_out(disk_path)},
        "optional_parts": {
            name: ("installed" if _is_installed(name) else "absent")
            + f", for {use} ({f'extra {extra}' if extra else f'pip install {name}'})"
            for name, use, extra in _OPTIONAL
        },
        "plugins": {kind: plugin_names(kind) for kind in PLUGIN_KINDS},
        "limits": {"blocks in a pool": 2**31 - 2, "priority": "0..100", "token": "0..4294967295"},
    }


def _is_installed(name: str) -> bool:
    """Tell whether a module is there; a part of a package that is absent is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _tuning() -> dict[str, str]:
    """Tell which table chooses the way of copying; nothing where there is no GPU."""
    try:
        gpu = find_gpu()
    except KvbmError:  # `device` says why
        gpu = None
    return {} if gpu is None else {"copies": f"paths chosen by the table {load_table(gpu).origin}"}


def _io_uring() -> str:
    """Tell whether a ring of the kernel's can be had here."""
    disk_io = default_backend().disk_io
    if disk_io is None:
        return "not used: the native twin is absent, Python's own threads move blocks"
    with tempfile.TemporaryFile() as file:
        try:
            disk_io.DiskQueue(file.fileno(), kind="uring", depth=8).close()
        except OSError as error:
            return f"cannot be had: {error.strerror or error}"
    return "can be had"


def _try_out(directory: Path) -> dict[str, Any]:
    """Open a small slab in a folder of its own below a directory, and tell how its blocks would move.

    Raises
    ------
    StorageError
        With errno and path: nothing can be made there.
    """
    layout = BlockLayout.fully_contiguous(
        num_blocks=_PROBE_BLOCKS,
        num_layers=1,
        outer_dim=1,
        block_size=1,
        inner_dim=_PROBE_BLOCK_NBYTES,
        dtype="uint8",
    )
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".kvbm-info-") as folder:
            with DiskStorage(layout, folder, engine="python") as storage:
                # Reading what was never written asks no device, and would say nothing of engines.
                ids = np.arange(_PROBE_BLOCKS, dtype=np.int32)
                storage.write(ids, np.ones((_PROBE_BLOCKS, _PROBE_BLOCK_NBYTES), dtype=np.uint8))
            with DiskStorage(layout, folder) as storage:
                return {
                    "directory": str(directory),
                    "engine": storage.engine_name,
                    "engine_reason": storage.engine_reason,
                    "io_mode": storage.io_mode,
                    "io_mode_reason": storage.io_mode_reason,
                    "alignment": f"{DIRECT_NBYTES} bytes" if storage.io_mode == "direct" else "any",
                    "preallocation": "no, files are sparse" if storage.is_sparse else "yes",
                }
    except StorageError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        text = f"cannot try out a disk tier here ({os.strerror(code).lower()}): give a directory that can be written"
        raise StorageError(code, text, str(directory)) from error


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_show(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unlimited" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
