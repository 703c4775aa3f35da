"""Times, as people write them: ``90``, ``90s``, ``30 min``, ``6h``, ``7d``; a number without a unit is seconds."""

from __future__ import annotations

import re

from kvbm.errors import ConfigError

DURATION_PATTERN = r"^ *[0-9]{1,9}(\.[0-9]{1,9})? *(s|min|h|d)? *$"
DURATION_ADVICE = 'seconds, more than 0, or a time such as "90s", "30 min", "6h" or "7d"'

_UNITS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_duration(duration: str) -> float:
    """Read a time.

    Parameters
    ----------
    duration : str
        A number with a unit: s, min, h or d; without one it is seconds.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    ConfigError
        It is no time.

    Examples
    --------
    >>> parse_duration("6h"), parse_duration("1.5 min"), parse_duration("90")
    (21600.0, 90.0, 90.0)
    """
    found = re.fullmatch(r" *([0-9.]+) *([a-z]*) *", duration) if re.match(DURATION_PATTERN, duration) else None
    if found is None:
        raise ConfigError(f"{duration!r} is no time, give {DURATION_ADVICE}")
    return float(found[1]) * _UNITS[found[2]]
