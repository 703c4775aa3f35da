"""The reference system's environment variables: accepted, each with one logged note that says what it became.

``_GB`` means 10^9 bytes there, an ``_OVERRIDE_NUM_BLOCKS`` beats the size, and 0 means no tier. Our own names win.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from kvbm.config.fields import refused, show

_log = logging.getLogger("kvbm.config")

# In the order of their weight.
_NAMES = {
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "host.num_blocks",
    "DYN_KVBM_CPU_CACHE_GB": "host.size",
    "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "disk.num_blocks",
    "DYN_KVBM_DISK_CACHE_GB": "disk.size",
    "DYN_KVBM_DISK_CACHE_DIR": "disk.path",
}


def read_reference_names(environ: Mapping[str, str], *, taken: set[str]) -> dict[str, tuple[int | str, str]]:
    """Read the reference system's variables.

    Parameters
    ----------
    environ : mapping
    taken : set of str
        Paths that the environment gives under our own names; these win.

    Returns
    -------
    dict
        Path to value and variable.

    Raises
    ------
    ConfigError
        A value is no number.
    """
    found: dict[str, tuple[int | str, str]] = {}
    for variable, path in _NAMES.items():
        text = environ.get(variable, "").strip()
        if not text:
            continue
        section, _, name = path.partition(".")
        rivals = {path} if name == "path" else {f"{section}.num_blocks", f"{section}.size"}
        value = (
            text if name == "path" else _count(variable, text) if name == "num_blocks" else _gigabytes(variable, text)
        )
        if value == 0:
            _log.info("variable=%s value=0 is left out: 0 means no %s tier", variable, section)
        elif rivals & (taken | set(found)):
            _log.info("variable=%s is left out: %s is given already", variable, " or ".join(sorted(rivals)))
        else:
            _log.info("variable=%s became %s=%s", variable, path, value)
            found[path] = (value, variable)
    return found


def _count(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise refused(f"environment variable {variable} is {show(text)}, give a number of blocks") from None


def _gigabytes(variable: str, text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 2**63 / 1e9:
        raise refused(
            f"environment variable {variable} is {show(text)}, give gigabytes (of 10^9 bytes), such as 16 or 0.5"
        )
    return round(number * 1e9)
