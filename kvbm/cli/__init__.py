"""The ``kvbm`` command, one command a file.

What commands share is here: files to be written are looked at before any work is done, and written at the end.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from kvbm.errors import ConfigError


def check_json_file(path: Path | None) -> None:
    """Refuse a file behind ``--json`` that could not be written; see `check_output_file`."""
    check_output_file("--json", path)


def check_output_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written, before the work whose figures it shall hold; leaves nothing behind.

    Raises
    ------
    ConfigError
        It is a folder, its folder is absent, or writing there is not allowed.
    """
    if path is None:
        return
    if path.is_dir():
        raise _unwritable(option, path, os.strerror(errno.EISDIR))
    if not path.parent.is_dir():
        raise _unwritable(option, path, os.strerror(errno.ENOENT))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unwritable(option, path, os.strerror(errno.EACCES))


def write_json_file(path: Path | None, values: dict[str, Any]) -> None:
    """Write plain values behind ``--json`` as indented JSON; None writes nothing.

    Raises
    ------
    ConfigError
        The file cannot be written after all, e.g. the disk is full.
    """
    if path is not None:
        write_output_file("--json", path, json.dumps(values, indent=2) + "\n")


def write_output_file(option: str, path: Path, text: str) -> None:
    """Write text into the file behind an option.

    Raises
    ------
    ConfigError
        The file cannot be written after all, e.g. the disk is full.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(option, path, error.strerror or str(error)) from error


def _unwritable(option: str, path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{option} {path} cannot be written: {reason}")
