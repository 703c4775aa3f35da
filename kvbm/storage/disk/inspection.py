"""What a slab holds, for people: its header, how full it is, how old its blocks are. Only reads, beside an owner."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.storage.disk.calls import OsCalls
from kvbm.storage.disk.format import RECORD_NBYTES, RECORDS_AT, VERSION, Header, RecordArray
from kvbm.storage.disk.reader import SlabName, SlabReader

# Upper bounds of ages in seconds, and their names; what is older than the last is "older".
AGES: tuple[tuple[int, str], ...] = (
    (60, "1 minute"), (600, "10 minutes"), (3600, "1 hour"), (6 * 3600, "6 hours"), (24 * 3600, "1 day"),
    (7 * 24 * 3600, "7 days"), (30 * 24 * 3600, "30 days"),
)  # fmt: skip
_MAX_CHAIN_BITS = 20  # chains of 2**19 blocks and more are counted together


@dataclass(frozen=True)
class SlabInspection:
    """What was found in a slab.

    Attributes
    ----------
    directory, name : str
    problem : str
        Why its header cannot be read; empty where it can. With one, what follows is empty.
    is_held, holder : bool, int or None
        Whether a process holds it, and which one, None where that cannot be told.
    version, num_whole_headers : int
        Of the format; copies of the header that hold, of 2.
    fingerprint : tuple of str
        Its parts, "key=value" each.
    num_slots, block_nbytes, slot_nbytes, sequence, generation : int
        As in the header.
    made_at : float
        Seconds since 1970.
    num_blocks : int
        Blocks that a restart would find, each hash once.
    num_duplicates : int
        Further records of the same hashes.
    num_damaged : int
        Records that are not believed.
    data_nbytes, data_medium_nbytes, index_nbytes : int
        Sizes of the files, and what the data file takes of the medium.
    missing_nbytes : int
        By which the files are shorter than they must be.
    written, used : dict of str to int
        Blocks by the time since they were written and last used.
    priorities : dict of int to int
        Blocks by priority.
    chains : dict of str to int
        Chains by their length: blocks from the first one here to one that nothing here follows.
    num_headless : int
        Blocks whose parent is not in this slab: a hit needs it from another tier.
    """

    directory: str
    name: str
    problem: str = ""
    is_held: bool = False
    holder: int | None = None
    version: int = VERSION
    num_whole_headers: int = 0
    fingerprint: tuple[str, ...] = ()
    num_slots: int = 0
    block_nbytes: int = 0
    slot_nbytes: int = 0
    sequence: int = 0
    generation: int = 0
    made_at: float = 0.0
    num_blocks: int = 0
    num_duplicates: int = 0
    num_damaged: int = 0
    data_nbytes: int = 0
    data_medium_nbytes: int = 0
    index_nbytes: int = 0
    missing_nbytes: int = 0
    written: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    priorities: dict[int, int] = field(default_factory=dict)
    chains: dict[str, int] = field(default_factory=dict)
    num_headless: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the slots that hold a block that counts."""
        return (self.num_blocks + self.num_duplicates) / self.num_slots if self.num_slots else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as ``--json`` prints them."""
        return {**asdict(self), "fingerprint": list(self.fingerprint), "occupancy": self.occupancy}


def inspect_slab(slab: SlabName, *, now: float | None = None, os_calls: OsCalls | None = None) -> SlabInspection:
    """Look at a slab; nothing is written, and another process may hold it.

    Parameters
    ----------
    slab : SlabName
    now : float, optional
        Seconds since 1970.
    os_calls : OsCalls, optional

    Raises
    ------
    StorageError
        With errno and path: it is not there, or cannot be read.

    Notes
    -----
    A header that cannot be read is no error: it is the `problem` of what is returned.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from kvbm.layout import BlockLayout
    >>> from kvbm.storage.disk import DiskStorage
    >>> layout = BlockLayout.fully_contiguous(
    ...     num_blocks=4, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16"
    ... )
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     DiskStorage(layout, f"{parent}/blocks", fingerprint="model=tiny").close()
    ...     found = inspect_slab(SlabName(Path(parent, "blocks"), "rank0"))
    >>> found.num_slots, found.num_blocks, found.fingerprint
    (4, 0, ('model=tiny',))
    """
    with SlabReader(slab, os_calls=os_calls) as reader:
        holder = reader.find_holder()
        data, index = reader.describe_file("blocks"), reader.describe_file("index")
        common: dict[str, Any] = {
            "directory": str(slab.directory),
            "name": slab.name,
            "is_held": holder is not None,
            "holder": holder or None,
            "num_whole_headers": reader.num_whole_headers,
            "data_nbytes": data.st_size if data else 0,
            "data_medium_nbytes": data.st_blocks * 512 if data else 0,
            "index_nbytes": index.st_size if index else 0,
        }
        header = reader.header
        if header is None:
            return SlabInspection(problem=reader.problem, **common)
        records, is_live, is_damaged = reader.read_records()
    rows = records[is_live]
    needed = header.num_slots * header.slot_nbytes, RECORDS_AT + header.num_slots * RECORD_NBYTES
    missing = max(0, needed[0] - common["data_nbytes"]) + max(0, needed[1] - common["index_nbytes"])
    moment = time.time() if now is None else now
    priorities, counts = np.unique(rows["priority"], return_counts=True)
    num_blocks, chains, num_headless = _measure_chains(rows)
    return SlabInspection(
        **common,
        **_of_header(header),
        num_blocks=num_blocks,
        num_duplicates=len(rows) - num_blocks,
        num_damaged=int(np.count_nonzero(is_damaged)),
        missing_nbytes=missing,
        written=count_ages(moment - rows["written_at"].astype(np.float64)),
        used=count_ages(moment - rows["used_at"].astype(np.float64)),
        priorities=dict(zip(priorities.tolist(), counts.tolist(), strict=True)),
        chains=chains,
        num_headless=num_headless,
    )


def count_ages(ages_s: npt.NDArray[np.float64]) -> dict[str, int]:
    """Count ages in seconds: {"under 1 minute": 3, ...}, and "in the future" where a clock was set back."""
    bounds = np.array([bound for bound, _ in AGES], dtype=np.float64)
    # The medium knows whole seconds: what was written in this one is up to a second old, never in the future.
    is_future = ages_s < -1
    counts = np.bincount(np.searchsorted(bounds, ages_s[~is_future], side="right"), minlength=len(AGES) + 1).tolist()
    found = dict(zip([f"under {name}" for _, name in AGES] + ["older"], counts, strict=True))
    if num_future := int(np.count_nonzero(is_future)):
        found["in the future"] = num_future
    return found


def _of_header(header: Header) -> dict[str, Any]:
    return {
        "fingerprint": tuple(header.fingerprint.split("; ")) if header.fingerprint else (),
        "num_slots": header.num_slots,
        "block_nbytes": header.block_nbytes,
        "slot_nbytes": header.slot_nbytes,
        "sequence": header.sequence,
        "generation": header.generation,
        "made_at": header.made_at / 1e9,
    }


def _measure_chains(rows: RecordArray) -> tuple[int, dict[str, int], int]:
    """Count distinct hashes, chains by length, and blocks whose parent is elsewhere."""
    if not len(rows):
        return 0, {}, 0
    hash_ids, parent_ids = _number(rows["hash"], rows["parent"])
    place_of_id = np.full(max(hash_ids.max(), parent_ids.max()) + 1, -1, dtype=np.int64)
    place_of_id[hash_ids] = np.arange(len(rows))
    is_first = place_of_id[hash_ids] == np.arange(len(rows))  # a hash once
    parents = place_of_id[parent_ids]
    has_parent = parents >= 0
    # Each block jumps to its parent, then twice as far each time: depths in log(n) steps.
    up = np.where(has_parent, parents, np.arange(len(rows)))
    depths = has_parent.astype(np.int64)
    for _ in range(_MAX_CHAIN_BITS):
        if (up[up] == up).all():
            break
        depths += depths[up]
        up = up[up]
    is_leaf = is_first.copy()
    is_leaf[parents[has_parent]] = False
    lengths = np.minimum(depths[is_leaf] + 1, 2**_MAX_CHAIN_BITS - 1)
    counts = np.bincount(np.log2(lengths).astype(np.int64), minlength=1).tolist()
    chains = {_range_of(bit): num_chains for bit, num_chains in enumerate(counts) if num_chains}
    is_headless = is_first & ~has_parent & rows["parent"].any(axis=1)
    return int(np.count_nonzero(is_first)), chains, int(np.count_nonzero(is_headless))


def _range_of(bit: int) -> str:
    return "1" if bit == 0 else f"{2**bit}-{2 ** (bit + 1) - 1}"


def _number(*lists: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.int64]]:
    """Give equal hashes equal numbers, those of all lists together."""
    words = np.concatenate(lists)
    order = np.lexsort((words[:, 1], words[:, 0]))
    is_other = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    numbers = np.zeros(len(words), dtype=np.int64)
    numbers[order[1:]] = np.cumsum(is_other)
    return np.split(numbers, np.cumsum([len(part) for part in lists])[:-1].tolist())
