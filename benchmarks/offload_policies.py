"""Compares offload policies on a trace: what they write to the disk tier, and what they find again.

``python benchmarks/offload_policies.py TRACE`` prints a table; each row is a replay of the whole trace, one request
after the other, through a real manager with real bytes. Blocks are small, because only their number counts here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from kvbm.config import Config
from kvbm.manager import BlockManager
from kvbm.replay import read_trace, replay
from kvbm.types import Tier

# Policies into the host and into the disk tier.
EDGES = [
    ("always", "always"),
    ("always", "second_use"),
    ("always", "tinylfu"),
    ("second_use", "second_use"),
    ("tinylfu", "tinylfu"),
]


def measure(trace: Path, edges: tuple[str, str], num_blocks: tuple[int, int, int]) -> dict[str, object]:
    """Replay a trace and give hit rate and blocks written."""
    with tempfile.TemporaryDirectory(prefix="kvbm-policies-") as directory:
        config = Config.from_dict(
            {
                "model": {
                    "num_layers": 1,
                    "outer_dim": 1,
                    "inner_dim": 4,
                    "block_size": 16,
                    "dtype": "uint8",
                    "fingerprint": "replay",
                },
                "device": {"num_blocks": num_blocks[0]},
                "host": {"num_blocks": num_blocks[1], "offload_policy": edges[0]},
                "disk": {"num_blocks": num_blocks[2], "path": f"{directory}/disk", "offload_policy": edges[1]},
            }
        )
        with BlockManager(config) as manager:
            report = replay(manager, read_trace(trace))
            statistics = manager.statistics()
    return {
        "host policy": edges[0],
        "disk policy": edges[1],
        "hit rate": round(report.hit_rate, 4),
        "hits by tier": dict(statistics.hits),
        "blocks to host": statistics.routes[Tier.DEVICE, Tier.HOST].blocks,
        "blocks to disk": statistics.routes[Tier.HOST, Tier.DISK].blocks,
        "wrong bytes": report.wrong_bytes,
        "seconds": round(report.seconds, 1),
    }


def main() -> None:
    """Print a row for each pair of policies, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--blocks", type=int, nargs=3, default=(500, 2000, 20000), metavar=("DEVICE", "HOST", "DISK"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for edges in EDGES:
        row = measure(arguments.trace, edges, tuple(arguments.blocks))
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"blocks": list(arguments.blocks), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
