"""A note in the disk tier's folder: what lies here was to be forgotten, and the workers may not have been told.

An engine's workers hear of a reset with its next step, which may never come. So the scheduler's half leaves the note
first; workers that open the tier forget everything while it is there. It is taken away once all of them have answered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_NAME = "reset.note"
_TEXT = b"everything in this folder is to be forgotten before it is used\n"


class ResetNotes:
    """The notes of an engine's scheduler, one in the folder of each group of layers.

    Parameters
    ----------
    folders : sequence of Path
        Those that this machine does not have are left out: workers on other machines hear of a reset by steps only.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self.may_be_there = True  # of the process before

    def put(self) -> None:
        """Leave the notes, and have them on the medium before this returns.

        Raises
        ------
        OSError
            One cannot be written.
        """
        self.may_be_there = True
        for folder in self._folders:
            if folder.is_dir():
                fd = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                try:
                    os.write(fd, _TEXT)
                    os.fsync(fd)
                finally:
                    os.close(fd)
                _sync_folder(folder)

    def take_away(self) -> None:
        """Remove them; raises OSError where the system refuses."""
        for folder in self._folders:
            if is_noted(folder):
                (folder / _NAME).unlink()
                _sync_folder(folder)
        self.may_be_there = False


def is_noted(folder: Path) -> bool:
    """Whether what lies in a folder is to be forgotten before it is used."""
    return (folder / _NAME).exists()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
