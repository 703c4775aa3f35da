"""What the connector costs vLLM's scheduler for a prompt of 100,000 tokens: asked the first time, and again.

    python benchmarks/connector_cost.py

Blocks of 16 tokens, all of them in host memory; no vLLM is needed. `vllm_ttft.py` has these rows in its table.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any

from rich.console import Console

from kvbm._backend import default_backend
from kvbm.bench.report import Bar, bench_table
from kvbm.bench.rig import make_row
from kvbm.engines.digests import Digests
from kvbm.engines.groups import Group
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.step_channel import StepChannels
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.types import Tier

NUM_TOKENS, BLOCK_TOKENS = 100_000, 16
NUM_BLOCKS = NUM_TOKENS // BLOCK_TOKENS
COST_BARS = {"matched_tokens_first": Bar(1.5e-3), "matched_tokens_again": Bar(2e-5)}


def measure_cost(rounds: int = 200) -> list[dict[str, Any]]:
    """Time `SchedulerCore.matched_tokens` for requests that were never seen, and for the same ones at once again."""
    channels = StepChannels(1)
    pool = BlockPool(2 * NUM_BLOCKS, name="host", tier=Tier.HOST, backend=default_backend())
    planner = Planner([pool], channels.channels, foreign_tier=Tier.DEVICE)
    core = SchedulerCore([Group(planner, channels, block_nbytes=1 << 20)], block_tokens=BLOCK_TOKENS)
    core.speed.tokens_per_s = 1000.0
    digests = [hashlib.sha256(number.to_bytes(4, "little")).digest() for number in range(NUM_BLOCKS)]
    pool.register_blocks(pool.allocate_blocks(NUM_BLOCKS).complete(Digests().extend(digests))).release()
    first, again = [], []
    for number in range(-10, rounds):
        for times in (first, again):
            began = time.perf_counter()
            found = core.matched_tokens(str(number), digests, num_tokens=NUM_TOKENS, num_computed_tokens=0)
            seconds = time.perf_counter() - began
            if found != (NUM_TOKENS - BLOCK_TOKENS, True):
                raise RuntimeError(f"{found} tokens of {NUM_TOKENS} that are there")
            if number >= 0:  # the first ones warm up
                times.append(seconds)
        core.finished(str(number))
    planner.close(0.0)
    return [make_row("matched_tokens_first", "s", first, None), make_row("matched_tokens_again", "s", again, None)]


if __name__ == "__main__":
    caption = f"{NUM_TOKENS} tokens, {NUM_BLOCKS} blocks in host memory"
    Console().print(bench_table("connector in the scheduler", caption, measure_cost(), bars=COST_BARS))
    sys.exit(0)
