"""The page about the format of a slab says where each field lies, and its script reads what a storage wrote."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage
from kvbm.storage.disk import format as slab_format
from kvbm.storage.disk.format import (
    HEADER_NBYTES,
    MAGIC,
    RECORD_DTYPE,
    RECORD_NBYTES,
    RECORDS_AT,
    Header,
    encode_header,
)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "design" / "disk-format.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=300, num_layers=2, outer_dim=2, block_size=4, inner_dim=30, dtype="uint8"
)


def rows(section: str) -> list[tuple[int, int, str]]:
    """Give offset, size and name from the table of a section."""
    text = PAGE.partition(f"### {section}\n")[2].partition("\n#")[0]
    found = re.findall(r"^\| (\d+) \| (\d+|`\w+`) \| `(\w+)` \|", text, re.MULTILINE)
    return [(int(offset), int(size) if size.isdigit() else -1, name) for offset, size, name in found]


def test_the_page_has_every_field_of_a_record() -> None:
    fields: Any = RECORD_DTYPE.fields
    assert rows("Record") == [(offset, kind.itemsize, name) for name, (kind, offset) in fields.items()]
    assert f"| {RECORDS_AT} + {RECORD_NBYTES} i | {RECORD_NBYTES} |" in PAGE
    assert f"This page is version {slab_format.VERSION}" in " ".join(PAGE.split())


def test_the_page_has_every_field_of_the_header() -> None:
    header = Header(
        num_slots=3, block_nbytes=5, slot_nbytes=7, made_at=2**40 + 1, sequence=11, generation=13, fingerprint="ärmel"
    )
    values: dict[str, Any] = {**vars(header), "magic": MAGIC, "version": slab_format.VERSION}
    values |= {"record_nbytes": RECORD_NBYTES, "fingerprint_nbytes": 6, "fingerprint": "ärmel".encode()}
    data, covered = encode_header(header), bytearray(HEADER_NBYTES)
    for offset, size, name in rows("Header"):
        size = 6 if size < 0 else size
        covered[offset : offset + size] = b"\1" * size
        expected = values.pop(name, None)
        found = data[offset : offset + size]
        if name != "crc":
            assert found == (expected if isinstance(expected, bytes) else expected.to_bytes(size, "little")), name
    assert not values  # the page leaves nothing out
    assert not any(byte for byte, is_named in zip(data, covered, strict=True) if not is_named)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a slab with everything in it: overwritten, forgotten, touched and damaged records, one hash twice."""
    path = tmp_path / "disk"
    random = np.random.default_rng(3)
    hashes = random.integers(1, 2**63, (300, 2), dtype=np.uint64)
    with DiskStorage(LAYOUT, path, fingerprint="model=x") as storage:

        def record(first: int, last: int, which: int) -> None:
            ids = np.arange(first, last, dtype=np.int32)
            storage.write(ids, np.zeros((len(ids), LAYOUT.block_nbytes), dtype=np.uint8))
            storage.record(
                ids,
                hashes=hashes[which : which + len(ids)],
                checksums=random.integers(0, 2**63, len(ids), dtype=np.uint64),
                parents=hashes[-len(ids) :],
                priorities=random.integers(0, 101, len(ids)).astype(np.uint8),
            )

        record(0, 50, 0)
        storage.clear()  # what follows is of another generation
        record(20, 150, 20)
        record(100, 120, 200)
        record(200, 205, 30)  # names that other slots have
        storage.write(np.array([60], dtype=np.int32), np.zeros((1, LAYOUT.block_nbytes), dtype=np.uint8))
        storage.forget(hashes[70:80])
        storage.touch(np.array([90, 40]), hashes[[90, 40]], np.array([7, 100], dtype=np.uint8))
    data = bytearray((path / "rank0.index").read_bytes())
    data[RECORDS_AT + 130 * RECORD_NBYTES + 20] ^= 1
    (path / "rank0.index").write_bytes(data)
    return path


def test_the_script_of_the_page_lists_what_a_storage_finds(directory: Path) -> None:
    with DiskStorage(LAYOUT, directory, fingerprint="model=x") as storage:
        ids, hashes, parents, priorities = storage.inventory()
        checksums = storage.checksums[ids]
    assert len(ids) > 100
    namespace: dict[str, Any] = {"__name__": "__page__"}
    exec(compile(SCRIPT, "read_slab.py", "exec"), namespace)
    found = namespace["live_blocks"](directory / "rank0.index")
    assert [slot for slot, _ in found] == ids.tolist()
    assert b"".join(record.hash for _, record in found) == hashes.tobytes()
    assert b"".join(record.parent for _, record in found) == parents.tobytes()
    assert [record.priority for _, record in found] == priorities.tolist()
    assert [record.checksum for _, record in found] == checksums.tolist()
    data = bytearray((directory / "rank0.index").read_bytes())
    data[100] ^= 1  # one copy of the header is enough
    (directory / "rank0.index").write_bytes(data[: RECORDS_AT + 120 * RECORD_NBYTES + 7])  # and fewer records are fewer
    cut = namespace["live_blocks"](directory / "rank0.index")
    assert {slot for slot, _ in cut} >= {slot for slot in ids.tolist() if slot < 120}


def test_the_script_is_short_needs_nothing_and_runs_as_it_stands(directory: Path, tmp_path: Path) -> None:
    assert len(SCRIPT.splitlines()) <= 50
    assert not set(re.findall(r"^(?:import|from) (\w+)", SCRIPT, re.MULTILINE)) - {
        *("struct", "sys", "zlib", "collections", "hashlib", "numpy")
    }
    script = tmp_path / "read_slab.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-S", "-E", str(script), str(directory / "rank0.index")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)
    with DiskStorage(LAYOUT, directory, fingerprint="model=x") as storage:
        ids, hashes, _, _ = storage.inventory()
    names = [[str(slot), row.tobytes().hex()] for slot, row in zip(ids, hashes, strict=True)]
    assert [line.split()[:2] for line in done.stdout.splitlines()] == names
