"""What a child process tells the doctor: lines of a file, written as it goes, so what came before its end counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbm.storage import Storage
from kvbm.types import Tier


class ReportWriter:
    """The child's side.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, what: str) -> None:
        """Say what is tried next."""
        self.write("stage", what)

    def write(self, kind: str, value: Any) -> None:
        """Add a line; it is in the file when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: value}) + "\n")


@dataclass
class ChildReport:
    """The parent's side.

    Attributes
    ----------
    stage : str
        What was tried last.
    golden, layouts, disks : list of dict
        A `GoldenResult`, the facts of a group's layout, and those of a disk storage, each.
    warnings : list of str
        What an engine would say of itself.
    error : str
        What the child was stopped by; empty where nothing did.
    is_complete : bool
        It came to its end.
    """

    stage: str = "nothing"
    golden: list[dict[str, Any]] = field(default_factory=list)
    layouts: list[dict[str, Any]] = field(default_factory=list)
    disks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    is_complete: bool = False

    @classmethod
    def read(cls, path: Path) -> ChildReport:
        """Read what there is; a line that was being written when the child died is left out."""
        report = cls()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                ((kind, value),) = json.loads(line).items()
            except ValueError:
                continue
            if kind in ("stage", "error"):
                setattr(report, kind, value)
            elif kind in ("golden", "layouts", "disks", "warnings"):
                getattr(report, kind).append(value)
            elif kind == "end":
                report.is_complete = True
        return report

    @property
    def num_groups(self) -> int:
        """Groups of layers; 1 where none was seen."""
        return len({layout["group"] for layout in self.layouts}) or 1

    @property
    def has_one_copy(self) -> bool:
        """Whether the ranks would share every group's tiers."""
        return bool(self.layouts) and all(layout.get("is_shared", False) for layout in self.layouts)

    @property
    def block_nbytes(self) -> int:
        """Of a block on one rank, the largest group's; 0 where none was seen."""
        return max((int(layout["block_nbytes"]) for layout in self.layouts), default=0)


def describe_disk(storages: Mapping[Tier, Storage]) -> dict[str, str] | None:
    """Tell how a shard's disk tier moves its blocks; None where there is no such tier."""
    storage = storages.get(Tier.DISK)
    names = ("engine_name", "engine_reason", "io_mode", "io_mode_reason")
    return None if storage is None else {name: str(getattr(storage, name, "")) for name in names}
