"""kvbm's host tier against LMCache's CPU tier: the same bytes, in turns, in one process. README.md says what counts.

    python benchmarks/peers/lmcache_cpu.py [--json FILE] [--rounds N] [--gib N] [--request-blocks N]

Exit status 0 also where LMCache is not installed, 1 where it does not import or where a byte came back wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from contender import Contender, Workload
from kvbm_contender import KvbmContender
from rich.console import Console

from kvbm._backend import default_backend
from kvbm.bench.machine import describe_machine
from kvbm.bench.report import Bar, bench_table
from kvbm.cli import check_json_file, write_json_file
from kvbm.errors import ConfigError

QUIET = {"LMCACHE_LOG_LEVEL": "CRITICAL", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}  # read when imported
CASES = (("64k", 16), ("1m", 256))  # bytes of a block, and its tokens
VERBS = ("store", "retrieve")
SPEED_BAR, OVERHEAD_BAR = Bar(1.5, "ratio"), Bar(5.0, "ratio")
BARS = {
    f"{verb}_{kind}{case}": bar
    for verb in VERBS
    for case, _ in CASES
    for kind, bar in (("", SPEED_BAR), ("overhead_", OVERHEAD_BAR))
}


class WrongBytes(RuntimeError):
    """What a contender brought back is not what was stored."""


@dataclass
class Times:
    """Seconds that each request of each round took: verb -> rounds of (num_requests,) float64."""

    store: list[npt.NDArray[np.float64]] = field(default_factory=list)
    retrieve: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def speeds(self, verb: str, nbytes: int) -> npt.NDArray[np.float64]:
        """GB/s of each round."""
        return nbytes / 1e9 / np.array([seconds.sum() for seconds in getattr(self, verb)])

    def block_times(self, verb: str, request_blocks: int) -> npt.NDArray[np.float64]:
        """Microseconds a block, by the median request of each round."""
        return np.array([np.median(seconds) for seconds in getattr(self, verb)]) / request_blocks * 1e6


def take_turns(contenders: Sequence[Contender], workload: Workload, rounds: int) -> list[Times]:
    """Let each have its turn in every round; the first round is thrown away."""
    times = [Times() for _ in contenders]
    for number in range(rounds + 1):
        for contender, taken in zip(contenders, times, strict=True):
            stored, retrieved = take_turn(contender, workload)
            if number:
                taken.store.append(stored)
                taken.retrieve.append(retrieved)
    return times


def take_turn(contender: Contender, workload: Workload) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Store and retrieve all requests, and verify each byte; the garbage collector rests meanwhile."""
    contender.prepare()
    stored = time_calls(contender.store, workload.num_requests)
    contender.wipe()
    found: list[int] = []
    retrieved = time_calls(lambda request: found.append(contender.retrieve(request)), workload.num_requests)
    if found != [workload.request_blocks] * workload.num_requests:
        raise WrongBytes(f"{contender.name}: {sum(found)} of {workload.num_blocks} blocks were found again")
    if contender.moves_bytes and not np.array_equal(contender.read_back(), workload.data):
        raise WrongBytes(f"{contender.name}: bytes came back wrong")
    contender.forget()
    return stored, retrieved


def time_calls(call: Callable[[int], object], num_calls: int) -> npt.NDArray[np.float64]:
    """Call with 0, 1, ...; give the seconds of each."""
    seconds = np.empty(num_calls)
    gc.collect()
    gc.disable()
    try:
        for i in range(num_calls):
            began = time.perf_counter()
            call(i)
            seconds[i] = time.perf_counter() - began
    finally:
        gc.enable()
    return seconds


def measure(contenders: Sequence[Contender], workload: Workload, rounds: int) -> list[Times]:
    """Let the contenders take turns, and close them."""
    try:
        return take_turns(contenders, workload, rounds)
    finally:
        for contender in contenders:
            contender.close()


def speed_rows(case: str, workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """GB/s of both; the reference is the better of the two ways to copy that we offer LMCache."""
    from lmcache_contender import LMCacheContender

    peers = [LMCacheContender(workload, how) for how in ("memcpy", "torch")]
    ours, *theirs = measure([KvbmContender(workload), *peers], workload, rounds)
    rows = []
    for verb in VERBS:
        speeds = ours.speeds(verb, workload.nbytes)
        medians = {
            peer.name: float(np.median(t.speeds(verb, workload.nbytes))) for peer, t in zip(peers, theirs, strict=True)
        }
        best = max(medians, key=medians.__getitem__)
        rows.append(make_row(f"{verb}_{case}", "GB/s", speeds, medians[best], is_more_better=True) | {"peers": medians})
    return rows


def overhead_rows(case: str, workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """Time of a block whose bytes do not count: 2 a token for us, none at all for LMCache."""
    from lmcache_contender import LMCacheContender

    contenders = [KvbmContender(workload), LMCacheContender(workload, "nothing")]
    ours, theirs = (
        [times.block_times(verb, workload.request_blocks) for verb in VERBS]
        for times in measure(contenders, workload, rounds)
    )
    return [
        make_row(f"{verb}_overhead_{case}", "us/block", own, float(np.median(peer)), is_more_better=False)
        for verb, own, peer in zip(VERBS, ours, theirs, strict=True)
    ]


def make_row(
    name: str, unit: str, values: npt.NDArray[np.float64], reference: float, *, is_more_better: bool
) -> dict[str, Any]:
    """Give a row as ``kvbm bench`` does; a ratio above 1 speaks for us."""
    median = float(np.median(values))
    return {
        "name": name,
        "unit": unit,
        "median": median,
        "spread": [float(value) for value in np.percentile(values, [10, 90])],
        "reference": reference,
        "ratio": median / reference if is_more_better else reference / median,
    }


def run(gib: float, rounds: int, request_blocks: int) -> list[dict[str, Any]]:
    """Measure all cases; a row for each verb of each."""
    rows = []
    for case, block_size in CASES:
        num_requests = int(gib * (1 << 30)) // Workload(request_blocks, request_blocks, block_size).nbytes
        num_blocks = num_requests * request_blocks
        rows += speed_rows(case, Workload(num_blocks, request_blocks, block_size), rounds)
        tiny = Workload(num_blocks, request_blocks, block_size, num_layers=1, inner_dim=1, dtype="uint8")
        rows += overhead_rows(case, tiny, rounds)
    return rows


def main() -> int:
    """Read the command line, measure, and show."""
    parser = argparse.ArgumentParser(description="kvbm's host tier against LMCache's CPU tier")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gib", type=float, default=1.0, help="bytes that are stored and retrieved in a round")
    parser.add_argument("--request-blocks", type=int, default=64, help="blocks stored or retrieved by one call")
    options = parser.parse_args()
    if options.rounds < 1 or options.request_blocks < 1 or options.gib * (1 << 30) < options.request_blocks << 20:
        parser.error("give one round or more, and memory for at least one request of 1 MiB blocks")
    try:
        check_json_file(options.json)
    except ConfigError as error:
        parser.error(str(error))
    if importlib.util.find_spec("lmcache") is None:
        print("skipped: LMCache is not installed, see benchmarks/peers/README.md")
        return 0
    if default_backend().memcpy_blocks is None:
        print(f"skipped: the native twin is needed, this is {default_backend().name} ({default_backend().reason})")
        return 0
    os.environ.update(QUIET)
    try:
        import lmcache_contender  # noqa: F401
    except (ImportError, OSError) as error:
        print(f"LMCache is installed but does not import: {error}; see benchmarks/peers/README.md", file=sys.stderr)
        return 1
    try:
        with Console(stderr=True).status("measuring kvbm and LMCache in turns"):
            rows = run(options.gib, options.rounds, options.request_blocks)
    except WrongBytes as error:
        print(error, file=sys.stderr)
        return 1
    machine = describe_machine() | {name: importlib.metadata.version(name) for name in ("lmcache", "torch")}
    title = f"host tier: {machine['processor']}, LMCache {machine['lmcache']}"
    Console().print(bench_table(title, "reference: LMCache; ratio above 1: kvbm is better", rows, bars=BARS))
    command = (
        f"python benchmarks/peers/lmcache_cpu.py --rounds {options.rounds} --gib {options.gib:g} "
        f"--request-blocks {options.request_blocks}"
    )
    write_json_file(options.json, {"machine": machine, "command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
