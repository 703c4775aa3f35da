"""Time to first token in the real vLLM, on the CPU: cold, from each tier, and what the connector costs without a hit.

    python benchmarks/vllm_ttft.py [--json FILE] [--rounds N] [--pairs N] [--tokens N]

A model of 26 million random weights in bfloat16, made on the spot; blocks of 128 tokens, chunks of 4,096. Every engine
is a process of its own, and those that are compared take turns, request by request, so that what else the machine does
hits all. Texts of hits are compared with the cold ones. `nox -s vllm -- --bench` runs it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "tests" / "vllm")]

from connector_cost import COST_BARS, measure_cost  # noqa: E402
from throttle import Throttle  # noqa: E402
from vllm_site import ENVIRONMENT, Engine, make_model, prompt_of  # noqa: E402

from kvbm.bench.machine import describe_machine  # noqa: E402
from kvbm.bench.report import Bar, bench_table  # noqa: E402
from kvbm.bench.rig import make_row  # noqa: E402
from kvbm.cli import check_json_file, write_json_file  # noqa: E402
from kvbm.types import Tier  # noqa: E402

BLOCK_TOKENS = 128
BATCH = 8
NUM_BATCHES = 3  # for each prompt of a pair
HITS = 3  # of each kind, for each prompt
NUM_LEARNING = 20
SLOW_DISK = 20e6  # bytes a second
BARS = {
    "ttft_host_hit": Bar(25, "ratio"),
    "ttft_disk_hit": Bar(17, "ratio"),
    "host_behind_local": Bar(0.06),
    "disk_behind_local": Bar(0.12),
    "host_beside_example": Bar(2, "ratio"),
    "disk_beside_example": Bar(2, "ratio"),
    "unseen_ttft": Bar(0.97, "ratio"),
    "batch8_rate": Bar(0.98, "ratio"),
    "slow_disk_ttft": Bar(0.9, "ratio"),
    **COST_BARS,
}


class Subject:
    """One engine in this process.

    Parameters
    ----------
    kind : {"kvbm", "kvbm_in_step", "kvbm_switched", "example", "none"}
        Its connector: ours, the same with ``"loads": "sync"``, ours with a switch, vLLM's example, or none.
    model, folder : str
        Folders of the model, and of what the connector keeps.
    num_tokens : int
        Of a prompt.
    """

    def __init__(self, kind: str, model: str, folder: str, num_tokens: int) -> None:
        self._kind, self._model, self._folder, self._num_tokens = kind, model, folder, num_tokens
        self._is_ours = kind.startswith("kvbm")
        self._engine = self._start()

    def restart(self) -> None:
        """End the engine and start another on the same folder; it computes one short prompt first."""
        self._engine.close()
        self._engine = self._start()

    def first_token(self, seed: int) -> tuple[float, int, tuple[int, ...]]:
        """Give the seconds to a prompt's first token, how many of its tokens were cached, and that token."""
        prompt = prompt_of(seed, self._num_tokens)
        began = time.perf_counter()
        (text,), (num_cached,) = self._engine.generate([prompt], 1)
        return time.perf_counter() - began, num_cached, text

    def batch_rate(self, seed: int) -> float:
        """Give the tokens a second of 8 requests together, from 128 tokens each to 128 more."""
        prompts = [prompt_of(seed + number, 128) for number in range(BATCH)]
        began = time.perf_counter()
        texts, _ = self._engine.generate(prompts, 128)
        return sum(map(len, texts)) / (time.perf_counter() - began)

    def switch(self, *, is_on: bool) -> None:
        """Let the connector do its work, or nothing."""
        from switched_connector import SwitchedConnector

        SwitchedConnector.is_on = is_on

    def settle(self) -> None:
        """Let copies end."""
        if self._is_ours:
            self._engine.settle()

    def forget(self, *, and_memory: bool = False) -> None:
        """Drop the engine's own prefix cache, and the host tier's blocks."""
        self.settle()
        if not self._engine.llm.reset_prefix_cache():
            raise RuntimeError("blocks are held: nothing was forgotten")
        if and_memory:
            self._engine.forget_memory()

    def slow_down(self) -> None:
        """Make the disk slow."""
        self._engine.settle()
        Throttle(SLOW_DISK).put_on(self._engine.worker._shards[0].storages[Tier.DISK])

    def end(self) -> None:
        """End the engine."""
        self._engine.close()

    def _start(self) -> Engine:
        from vllm.config import KVTransferConfig

        block_nbytes = BLOCK_TOKENS * 8 * 4 * 64 * 2 * 2  # layers, heads, their size, K and V, bytes
        prompt_nbytes = self._num_tokens // BLOCK_TOKENS * block_nbytes
        more: dict[str, Any] = {
            "dtype": "bfloat16",
            "block_size": BLOCK_TOKENS,
            "max_model_len": self._num_tokens + BLOCK_TOKENS,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": max(3 * prompt_nbytes, 64 << 20),
        }
        extra = {
            "host": 16 * prompt_nbytes,
            "disk": {"path": str(Path(self._folder, "slab")), "size": 48 * prompt_nbytes},
        }
        transfers = {
            "example": {
                "kv_connector": "ExampleConnector",
                "kv_connector_extra_config": {"shared_storage_path": self._folder},
            },
            "kvbm_switched": {
                "kv_connector": "SwitchedConnector",
                "kv_connector_module_path": "switched_connector",
                "kv_connector_extra_config": extra,
            },
        }
        if self._kind == "example":  # of a prompt in chunks it keeps the first only
            more["max_num_batched_tokens"] = self._num_tokens + BLOCK_TOKENS
        if self._kind == "kvbm_in_step":
            extra["loads"] = "sync"
        if self._is_ours:
            Path(self._folder, "slab").mkdir(parents=True, exist_ok=True)
        if self._kind in transfers:
            more["kv_transfer_config"] = KVTransferConfig(kv_role="kv_both", **transfers[self._kind])
        is_plain = self._is_ours and self._kind not in transfers
        engine = Engine(Path(self._model), extra=extra, has_connector=is_plain, learns_speed=True, **more)
        engine.generate([prompt_of(9, 64)], 1)
        return engine


class Remote:
    """A `Subject` in a process of its own; called as it is.

    Parameters
    ----------
    kind, model, folder, num_tokens
        See `Subject`.
    """

    def __init__(self, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, arguments), daemon=True)
        self._process.start()
        other.close()
        self._take()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            self._end.send((name, arguments, more))
            return self._take()

        return call

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._end.send(("end", (), {}))
        self._process.join()

    def _take(self) -> Any:
        try:
            answer = self._end.recv()
        except EOFError:
            raise RuntimeError("an engine's process has ended, see its output above") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer[0]


def _serve(connection: Connection, arguments: tuple[Any, ...]) -> None:
    os.environ.update(ENVIRONMENT)
    subject = Subject(*arguments)
    connection.send((None,))
    while True:
        name, given, more = connection.recv()
        try:
            connection.send((getattr(subject, name)(*given, **more),))
        except Exception as error:
            connection.send(repr(error))
        if name == "end":
            return


def _hit(answer: tuple[float, int, tuple[int, ...]], expected: tuple[int, ...], *, num_cached: int) -> float:
    """Give a request's seconds; it has to have the right text, and been a hit."""
    seconds, num_found, text = answer
    if text != expected or num_found != num_cached:
        raise RuntimeError(f"token {text} with {num_found} cached, expected {expected} with {num_cached}")
    return seconds


def measure_hits(model: str, folder: str, num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Time a prompt cold and from each place where its blocks may lie."""
    whole = (num_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    seeds = range(100, 100 + rounds)
    names = ("cold", "local", "host", "sync", "disk", "example_local", "example")
    times: dict[str, list[float]] = {name: [] for name in names}
    texts: dict[int, tuple[int, ...]] = {}

    def hit(name: str, subject: Remote, seed: int) -> None:
        times[name].append(_hit(subject.first_token(seed), texts[seed], num_cached=whole))

    with ExitStack() as stack:
        ours, in_step, example = (
            stack.enter_context(Remote(kind, model, f"{folder}-{kind}", num_tokens))
            for kind in ("kvbm", "kvbm_in_step", "example")
        )
        for seed in seeds:
            seconds, num_cached, texts[seed] = ours.first_token(seed)
            if num_cached:
                raise RuntimeError(f"{num_cached} tokens of a prompt that was never seen are cached")
            times["cold"].append(seconds)
            in_step.first_token(seed)
            example.first_token(seed)
            ours.settle()
            for _ in range(HITS):
                hit("local", ours, seed)
                hit("example_local", example, seed)
                for name, subject in (("host", ours), ("sync", in_step), ("example", example)):
                    subject.forget()
                    hit(name, subject, seed)
        ours.first_token(99)  # so that what came before has gone on to the disk
        ours.settle()
        ours.restart()
        for seed in seeds:
            hit("disk", ours, seed)
            ours.forget()
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [make_row("ttft_cold", "s", times["cold"], None)]
    rows += [make_row(f"ttft_{name}_hit", "s", times[name], medians["cold"]) for name in ("local", "host", "disk")]
    rows.append(make_row("ttft_host_hit_in_step", "s", times["sync"], medians["cold"]))
    rows.append(make_row("ttft_example_connector", "s", times["example"], medians["cold"]))
    rows += [make_row(f"{name}_beside_example", "s", times[name], medians["example"]) for name in ("host", "disk")]
    example_behind = medians["example"] - medians["example_local"]
    rows.append(make_row("example_behind_local", "s", np.array(times["example"]) - medians["example_local"], None))
    for name, row in (("host", "host"), ("sync", "host_in_step"), ("disk", "disk")):
        rows.append(make_row(f"{row}_behind_local", "s", np.array(times[name]) - medians["local"], example_behind))
    return rows


def measure_overhead(model: str, folder: str, num_tokens: int, pairs: int) -> list[dict[str, Any]]:
    """Time prompts that nobody has seen, and batches, in turns: with our connector, switched off, and without one.

    Two processes with the same engine differ by several percent, for as long as they live: the luck of their memory.
    So the connector is compared with one that does nothing in one process; with none it has to be in two.
    """
    kinds = ("on", "off", "none")
    first: dict[str, list[float]] = {kind: [] for kind in kinds}
    rate: dict[str, list[float]] = {kind: [] for kind in kinds}
    with (
        Remote("kvbm_switched", model, str(Path(folder, "slab")), num_tokens) as ours,
        Remote("none", model, folder, num_tokens) as other,
    ):
        for turn in range(-1, pairs):  # the first is thrown away
            for kind in kinds[:: 1 if turn % 2 else -1]:
                subject = other if kind == "none" else ours
                ours.switch(is_on=kind == "on")
                seconds, num_cached, _ = subject.first_token(1000 + turn)
                if num_cached:
                    raise RuntimeError(f"{num_cached} tokens of a prompt that was never seen are cached")
                rates = [
                    subject.batch_rate(5000 + BATCH * (NUM_BATCHES * turn + number)) for number in range(NUM_BATCHES)
                ]
                if turn >= 0:
                    first[kind].append(seconds)
                    rate[kind] += rates
                ours.switch(is_on=True)
                subject.forget()
    rows = []
    for kind, ending in (("off", ""), ("none", "_no_connector")):
        rows.append(_paired(f"unseen_ttft{ending}", "s", first["on"], first[kind], is_more_better=False))
        rows.append(_paired(f"batch8_rate{ending}", "tokens/s", rate["on"], rate[kind], is_more_better=True))
    return rows


def measure_slow_disk(model: str, folder: str, num_tokens: int, pairs: int) -> list[dict[str, Any]]:
    """Time a prompt that lies on a disk of 20 MB/s, when that is known, beside an engine without connector."""
    seed, slow, none = 3000, [], []
    with Remote("kvbm", model, folder, num_tokens) as ours, Remote("none", model, folder, num_tokens) as other:
        ours.first_token(seed)
        ours.settle()
        ours.first_token(seed - 1)
        ours.slow_down()
        for turn in range(-NUM_LEARNING, pairs):
            ours.forget(and_memory=True)
            seconds, _, _ = ours.first_token(seed)
            if turn >= 0:
                slow.append(seconds)
                none.append(other.first_token(seed + 1 + turn)[0])
    return [_paired("slow_disk_ttft", "s", slow, none, is_more_better=False)]


def _paired(name: str, unit: str, ours: list[float], others: list[float], *, is_more_better: bool) -> dict[str, Any]:
    """Give a row whose ratio is the median over pairs, with an interval that holds it at 95 %."""
    ratios = np.array(ours) / np.array(others) if is_more_better else np.array(others) / np.array(ours)
    rng = np.random.default_rng(7)
    medians = np.median(rng.choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    row = make_row(name, unit, ours, statistics.median(others), is_more_better=is_more_better)
    row |= {"ratio": float(np.median(ratios)), "ratio_interval": [float(low), float(high)], "num_pairs": len(ratios)}
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args(arguments)
    check_json_file(given.json)
    import vllm

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = str(make_model("llama26m", folder / "model"))
        rows = measure_hits(model, str(folder / "hits"), given.tokens, given.rounds)
        rows += measure_overhead(model, str(folder / "overhead"), given.tokens, given.pairs)
        rows += measure_cost()
        rows += measure_slow_disk(model, str(folder / "slow"), given.tokens, given.pairs)
    caption = (
        "ratio above 1 is better; hits are compared with cold, the others with a connector that does nothing, or none"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(
        bench_table(f"vLLM {vllm.__version__}, {given.tokens} tokens", caption, rows, bars=BARS)
    )
    about = {"machine": describe_machine(), "vllm": vllm.__version__, "tokens": given.tokens}
    write_json_file(given.json, {**about, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
