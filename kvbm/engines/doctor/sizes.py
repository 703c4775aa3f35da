"""Sizes of the tiers against each other: a lower tier holds copies of what is above, so it has to be larger."""

from __future__ import annotations

from kvbm.engines.doctor.findings import Finding, State, show_nbytes
from kvbm.engines.doctor.setup import Setup

_NAMES = {"host": "host tier", "disk": "disk tier"}


def check_sizes(setup: Setup, *, block_nbytes: int = 0, num_groups: int = 1) -> list[Finding]:
    """Compare the engine's memory, the host tier and the disk tier, each of all ranks together.

    Where the ranks' blocks hold the same bytes, the engine's memory counts once.

    Parameters
    ----------
    setup : Setup
    block_nbytes : int
        Of one block on one rank; 0 where it is not known.
    num_groups : int
        Of layers.
    """
    found = []
    above = "the engine's KV memory"
    above_nbytes = None if setup.device_nbytes is None else setup.device_nbytes * setup.num_parts
    if above_nbytes is None:
        text = "the engine's KV memory is not known: the host tier is not compared with it"
        advice = "give --kv-cache-memory SIZE, as the engine says at its start"
        found.append(Finding("sizes", State.NOTE, text, advice))
    for tier in ("host", "disk"):
        nbytes = setup.nbytes_of(tier, block_nbytes=block_nbytes, num_groups=num_groups)
        if tier not in setup.tiers or nbytes is None:
            continue
        text = f"the {_NAMES[tier]} has {show_nbytes(nbytes)}"
        if above_nbytes is not None:
            text += f", {above} {show_nbytes(above_nbytes)}"
        if above_nbytes is not None and nbytes < above_nbytes:
            advice = f"give {tier} at least as much: it holds copies of what is above, and forgets them sooner"
            found.append(Finding("sizes", State.WARNING, text, advice))
        elif above_nbytes is not None:
            found.append(Finding("sizes", State.OK, text))
        above, above_nbytes = f"the {_NAMES[tier]}", nbytes
    return found
