"""What the doctor has found: one line of its table each."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class State(str, enum.Enum):
    """How a finding counts."""

    OK = "ok"
    NOTE = "note"  # not looked at, or good to know; does not count
    WARNING = "warning"
    UNSAFE = "unsafe"  # wrong bytes, or an engine that does not start


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    subject : str
    state : State
    found : str
        What is so.
    advice : str
        What to do; empty where nothing is.
    """

    subject: str
    state: State
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Give plain values."""
        return {"subject": self.subject, "state": self.state.value, "found": self.found, "advice": self.advice}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Finding:
        """Read what `to_dict` gave."""
        return cls(values["subject"], State(values["state"]), values["found"], values["advice"])


def exit_status(findings: Iterable[Finding]) -> int:
    """Give 2 where something is unsafe, 1 where something is to be warned of, 0 otherwise.

    Examples
    --------
    >>> exit_status([Finding("disk", State.NOTE, "no disk tier"), Finding("host", State.OK, "20 GiB")])
    0
    """
    states = {finding.state for finding in findings}
    return 2 if State.UNSAFE in states else 1 if State.WARNING in states else 0


def show_nbytes(nbytes: float) -> str:
    """Write bytes for people: 3 digits or so.

    Examples
    --------
    >>> show_nbytes(20 << 30), show_nbytes(1536), show_nbytes(7)
    ('20 GiB', '1.5 KiB', '7 bytes')
    """
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << exponent:
            return (
                f"{nbytes / (1 << exponent):.3g} {unit}"
                if nbytes < 1000 << exponent
                else f"{nbytes / (1 << exponent):,.0f} {unit}"
            )
    return f"{nbytes:.0f} bytes"
