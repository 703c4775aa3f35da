"""The ``kvbm`` command, one command a file.

What commands share is here: the file behind ``--json`` is looked at before any work is done, and written at the end.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from kvbm.errors import ConfigError


def check_json_file(path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose figures it shall hold; leaves nothing behind.

    Raises
    ------
    ConfigError
        It is a folder, its folder is absent, or writing there is not allowed.
    """
    if path is None:
        return
    if path.is_dir():
        raise _unwritable(path, os.strerror(errno.EISDIR))
    if not path.parent.is_dir():
        raise _unwritable(path, os.strerror(errno.ENOENT))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unwritable(path, os.strerror(errno.EACCES))


def write_json_file(path: Path | None, values: dict[str, Any]) -> None:
    """Write plain values as indented JSON; None writes nothing.

    Raises
    ------
    ConfigError
        The file cannot be written after all, e.g. the disk is full.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"--json {path} cannot be written: {reason}")
