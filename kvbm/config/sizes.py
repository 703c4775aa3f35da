"""Sizes in bytes, as people write them: ``8GiB``, ``8GB``, ``512 MiB``, ``1.5TiB``, or a plain number of bytes.

Units with an i are powers of 1,024, those without are powers of 1,000; letters may be of either case. A bare ``8G`` is
refused, because tools disagree about what it means.
"""

from __future__ import annotations

import re

from kvbm.errors import ConfigError

SIZE_PATTERN = r"^ *[0-9]{1,18}(\.[0-9]{1,18})? *([kKmMgGtTpPeE]?[iI]?[bB])? *$"
SIZE_ADVICE = 'bytes, or a size such as "8GiB", "512 MiB" or "1.5TB"'

_PARTS = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kmgtpe]?)(i?)(?:b?)", re.IGNORECASE)
_PREFIXES = " kmgtpe"
_BINARY_UNITS = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")


def parse_size(size: int | str) -> int:
    """Read a size.

    Parameters
    ----------
    size : int or str
        Bytes, or a number with a unit: B, or k, M, G, T, P, E with or without an i, and a B.

    Returns
    -------
    int
        Bytes, rounded down.

    Raises
    ------
    ConfigError
        It is no size.

    Examples
    --------
    >>> parse_size("1.5GiB"), parse_size("512 MB"), parse_size(4096)
    (1610612736, 512000000, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    if not isinstance(size, str) or not re.match(SIZE_PATTERN, size):
        raise ConfigError(f"{size!r} is no size, give {SIZE_ADVICE}")
    found = _PARTS.fullmatch(size.strip(" "))
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{size!r} is no size, give {SIZE_ADVICE}")
    from fractions import Fraction  # slow to import, and few sizes have a unit

    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    return int(Fraction(number) * base ** _PREFIXES.index(prefix.lower() or " "))


def show_size(nbytes: int) -> str:
    """Write bytes as `parse_size` reads them: in the largest binary unit that holds them exactly.

    Examples
    --------
    >>> show_size(8 << 30), show_size(1_000_000)
    ('8GiB', '1000000')
    """
    for exponent, unit in zip(range(60, 0, -10), _BINARY_UNITS, strict=True):
        if nbytes and nbytes % (1 << exponent) == 0:
            return f"{nbytes >> exponent}{unit}"
    return str(nbytes)
