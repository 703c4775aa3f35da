"""The disk tier's place: writable, room, what kind of file system, and slabs that lie there already."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvbm.engines.doctor.findings import Finding, State, show_nbytes
from kvbm.engines.doctor.setup import Setup
from kvbm.errors import StorageError
from kvbm.storage.disk.inspection import SlabInspection, inspect_slab
from kvbm.storage.disk.reader import SlabName, find_slabs

_MOUNTS = Path("/proc/self/mountinfo")
_MEMORY_SYSTEMS = ("tmpfs", "ramfs")
_FAR_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "glusterfs", "afs")


def nearest_folder(path: Path) -> Path:
    """Give the directory, or where it is absent the one above that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_disk(setup: Setup, *, block_nbytes: int = 0, num_groups: int = 1, mounts: Path = _MOUNTS) -> list[Finding]:
    """Look at the directory of the disk tier.

    Parameters
    ----------
    setup : Setup
    block_nbytes, num_groups : int
        As for `check_sizes`.
    mounts : Path
        The system's list.
    """
    path = setup.disk_path
    if path is None:
        advice = "without one, nothing outlives the engine's process" if "remote" not in setup.tiers else ""
        return [Finding("disk", State.NOTE, "no disk tier", advice)]
    folder = nearest_folder(path)
    if not folder.is_dir():
        return [Finding("disk", State.UNSAFE, f"{folder} is no directory", "give disk.path another one")]
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".kvbm-doctor-"):
            pass
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        advice = f"let the engine's user (uid {os.geteuid()} here) write there, or give disk.path another directory"
        return [Finding("disk", State.UNSAFE, f"{folder} cannot be written: {why}", advice)]
    found = []
    if folder != path.absolute() and folder != path.absolute().parent:
        found.append(Finding("disk", State.UNSAFE, f"{path} is absent, and so is its parent", f"mkdir -p {path}"))
    else:
        state = "can be written" if path.exists() else "is absent: the engine makes it"
        found.append(Finding("disk", State.OK, f"{path} {state}"))
    found += _check_room(setup, folder, path, block_nbytes=block_nbytes, num_groups=num_groups)
    return [*found, _check_kind(folder, mounts), *_look_at_slabs(path)]


def file_system_of(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Give the kind of a directory's file system; empty where the system does not say."""
    try:
        text = mounts.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    kind, longest = "", -1
    place = folder.resolve()
    for line in text.splitlines():
        parts = line.split(" ")
        try:
            point, fields = parts[4], parts[parts.index("-") + 1 :]
        except (IndexError, ValueError):
            continue
        mount = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))
        if len(mount.parts) >= longest and (mount == place or mount in place.parents):  # the last one lies on top
            kind, longest = fields[0], len(mount.parts)
    return kind


def compare_slabs(path: Path, golden: Path, *, is_replaced: bool = False) -> list[Finding]:
    """Compare the fingerprints of slabs with those that this engine would make.

    Parameters
    ----------
    path : Path
        Directory of the disk tier.
    golden : Path
        That of the run with little room, of the same model and engine.
    is_replaced : bool
        A slab that does not fit is replaced; otherwise the engine does not start.
    """
    found = []
    for expected in _slabs_below(golden):
        name = Path(expected.directory).relative_to(golden.absolute())
        index = SlabName(path.absolute() / name, expected.name)
        try:
            slab = inspect_slab(index)
        except StorageError:
            continue  # none is there yet
        if slab.problem or slab.fingerprint == expected.fingerprint:
            continue
        text = f"{index} holds blocks of another model or layout: {_difference(slab.fingerprint, expected.fingerprint)}"
        if is_replaced:
            advice = "keep them by another disk.path: on_mismatch is replace"
            found.append(Finding("slab", State.WARNING, f"{text}; they will be forgotten", advice))
            continue
        advice = "give the doctor the model and the arguments that the engine gets; if they are these: another "
        advice += 'disk.path, or "on_mismatch": "replace" in disk, which forgets those blocks'
        found.append(Finding("slab", State.UNSAFE, f"{text}; the engine would not start", advice))
    return found


def _difference(there: Sequence[str], here: Sequence[str]) -> str:
    """Show the parts of two fingerprints that differ."""
    old, new = (dict.fromkeys(piece for part in parts for piece in part.split(",")) for parts in (there, here))
    gone, come = ([piece for piece in one if piece not in other] for one, other in ((old, new), (new, old)))
    return f"{', '.join(gone) or 'nothing more'} there, {', '.join(come) or 'nothing more'} here"


def _check_room(setup: Setup, folder: Path, path: Path, *, block_nbytes: int, num_groups: int) -> list[Finding]:
    wanted = setup.nbytes_of("disk", block_nbytes=block_nbytes, num_groups=num_groups)
    if wanted is None:
        return []
    taken = sum(slab.data_medium_nbytes + slab.index_nbytes for slab in _slabs_below(path))
    free = shutil.disk_usage(folder).free
    text = f"{show_nbytes(wanted)} wanted, {show_nbytes(free)} free"
    text += f", {show_nbytes(taken)} taken by slabs already" if taken else ""
    if wanted - taken > free:
        advice = "make disk.size smaller, or free room: the slab is allocated when the engine starts"
        return [Finding("disk room", State.UNSAFE, text, advice)]
    return [Finding("disk room", State.OK, text)]


def _check_kind(folder: Path, mounts: Path) -> Finding:
    kind = file_system_of(folder, mounts)
    if kind in _MEMORY_SYSTEMS:
        advice = "give disk.path a directory on a disk: this one is memory, and empty after a restart"
        return Finding("file system", State.WARNING, kind, advice)
    if kind in _FAR_SYSTEMS or kind.startswith("fuse"):
        advice = "give disk.path a directory on a local disk: locks and what survives a power cut differ here"
        return Finding("file system", State.WARNING, kind, advice)
    return Finding("file system", State.OK if kind else State.NOTE, kind or "not known")


def _look_at_slabs(path: Path) -> list[Finding]:
    found = []
    for slab in _slabs_below(path):
        name = f"{slab.directory}/{slab.name}"
        if slab.problem:
            advice = 'remove it, or set "on_mismatch": "replace" in disk'
            found.append(Finding("slab", State.WARNING, f"{name}: {slab.problem}", advice))
            continue
        text = f"{name}: {slab.num_blocks:,} blocks in {slab.num_slots:,} slots"
        if slab.is_held:
            holder = f"process {slab.holder}" if slab.holder else "another process"
            advice = "an engine that starts beside it does not get the slab: give each a directory of its own"
            found.append(Finding("slab", State.NOTE, f"{text}, held by {holder}", advice))
        else:
            found.append(Finding("slab", State.OK, text))
    return found


def _slabs_below(path: Path) -> list[SlabInspection]:
    """Look at the slabs of a directory and of its groups' directories; what cannot be read is left out."""
    found = []
    for folder in (path, *sorted(path.glob("group*"))):
        with contextlib.suppress(StorageError, OSError):
            found += [inspect_slab(name) for name in find_slabs(folder)]
    return found
