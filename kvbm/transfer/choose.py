"""Chooses how a plan is copied on a GPU, by a table of measured crossovers. Arithmetic only.

A cell of the table is a direction, a run length and a number of runs, each rounded down to the nearest that was
measured; it names the paths, the fastest first. The first that the machine and the memory allow is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from kvbm.copyplan import CopyPlan
from kvbm.errors import ConfigError

DIRECTIONS = ("down", "up", "across")  # device to host, host to device, device to device
PATHS = ("memcpy", "batch", "kernel", "staged")

# Built in, until `kvbm tune` has measured this machine. A copy engine needs some 4 us for each run it is told apart, so
# one or few long runs go by plain copies, many long ones by one batched call. Short runs leave a copy engine idle:
# threads of a kernel fetch them side by side. On the device itself a kernel beats the copy engine at any length.
_BUILT_IN: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("down", 0, 1, ("memcpy",)),
    ("down", 0, 4, ("kernel", "staged", "batch", "memcpy")),
    ("down", 64 << 10, 4, ("batch", "staged", "kernel", "memcpy")),
    ("down", 256 << 10, 4, ("batch", "memcpy")),
    ("up", 0, 1, ("memcpy",)),
    ("up", 0, 4, ("staged", "kernel", "batch", "memcpy")),
    ("up", 64 << 10, 4, ("batch", "staged", "kernel", "memcpy")),
    ("up", 256 << 10, 4, ("batch", "memcpy")),
    ("across", 0, 1, ("memcpy",)),
    ("across", 0, 4, ("kernel", "batch", "memcpy")),
)


@dataclass(frozen=True)
class Shape:
    """What the choice looks at.

    Attributes
    ----------
    direction : {"down", "up", "across"}
    run_nbytes : int
        Bytes of a run that is contiguous on both sides.
    num_runs : int
    host_run_nbytes : int
        Bytes that are contiguous on the host's side alone: what one copy takes when a kernel gathers on the device.
    """

    direction: str
    run_nbytes: int
    num_runs: int
    host_run_nbytes: int


class Cell(msgspec.Struct, frozen=True):
    """From this run length and this number of runs on: the paths, the fastest first."""

    direction: str
    run_nbytes: int
    num_runs: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class PathTable:
    """Crossovers of one machine.

    Parameters
    ----------
    cells : tuple of Cell
    origin : str
        Where they come from: "built in", or a file that `kvbm tune` wrote.

    Raises
    ------
    ConfigError
        A cell names a direction or path that is not known, or a direction has none for short single runs.
    """

    cells: tuple[Cell, ...]
    origin: str = "built in"
    _by_direction: dict[str, tuple[Cell, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for cell in self.cells:
            if cell.direction not in DIRECTIONS or not cell.paths or set(cell.paths) - set(PATHS):
                raise ConfigError(
                    f"{cell} is no cell: directions are {', '.join(DIRECTIONS)}, paths {', '.join(PATHS)}"
                )
        ordered = sorted(self.cells, key=lambda cell: (cell.run_nbytes, cell.num_runs), reverse=True)
        object.__setattr__(
            self,
            "_by_direction",
            {name: tuple(cell for cell in ordered if cell.direction == name) for name in DIRECTIONS},
        )

    @classmethod
    def built_in(cls) -> PathTable:
        """Give the table that is used until this machine was measured."""
        return cls(tuple(Cell(*row) for row in _BUILT_IN))

    def ranking(self, shape: Shape) -> tuple[str, ...]:
        """Give the paths for a shape, the fastest first; every path that the cell leaves out follows."""
        best: Cell | None = None
        for cell in self._by_direction[shape.direction]:
            if cell.run_nbytes <= shape.run_nbytes and cell.num_runs <= shape.num_runs:
                best = cell
                break
        named = best.paths if best is not None else ()
        return (*named, *(path for path in PATHS if path not in named))


def choose_path(table: PathTable, shape: Shape, *, device: Any, is_pinned: bool) -> str:
    """Choose how to copy.

    Parameters
    ----------
    table : PathTable
    shape : Shape
    device : Device
        Says what it can do.
    is_pinned : bool
        The host's side is pinned; True where there is none.

    Returns
    -------
    str
        One of `PATHS`.
    """
    if not is_pinned:
        return "memcpy"  # the driver stages; nothing else can read that memory
    allowed = {
        "memcpy": True,
        "batch": device.has_batch_copy,
        "kernel": shape.direction == "across" or device.can_map_host,
        # Pays only where the host's side is in longer pieces than both sides together.
        "staged": shape.direction != "across" and shape.host_run_nbytes > shape.run_nbytes,
    }
    return next(path for path in table.ranking(shape) if allowed[path])


def shape_of(plan: CopyPlan, direction: str) -> Shape:
    """Measure a plan: O(number of blocks + number of pieces)."""
    nbytes, num_pieces, num_blocks = plan.piece_nbytes, len(plan.source_pieces), plan.num_blocks
    if num_pieces == 1 and num_blocks > 1:
        is_next = np.diff(plan.source_blocks) == np.uint64(nbytes)
        is_next &= np.diff(plan.destination_blocks) == np.uint64(nbytes)
        num_runs = num_blocks - int(np.count_nonzero(is_next))
    else:
        num_runs = num_blocks * num_pieces
    run_nbytes = num_blocks * num_pieces * nbytes // max(1, num_runs)
    host = plan.destination_pieces if direction == "down" else plan.source_pieces
    num_gaps = int(np.count_nonzero(np.diff(host) != np.uint64(nbytes))) if num_pieces > 1 else 0
    return Shape(direction, run_nbytes, num_runs, max(run_nbytes, num_pieces * nbytes // (num_gaps + 1)))
