"""A connector of a few lines that keeps blocks in a dict, right, or wrong in one chosen way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvbm.testing.fake_engine import ConnectorSchedules, EngineShape

FAULTS = (
    "loads a wrong block", "loads nothing", "reports received early", "reports received twice", "hides errors",
    "tells errors late", "forgets the fence", "leaks a hold", "holds nothing", "answers the whole prompt",
    "answers once", "takes on asking", "names blocks without their parents", "keeps on reset",
    "writes beyond its block", "changes the output", "forgets rank 1", "sends what it does not hold",
    "tries again for ever", "ends unknown requests badly",
)  # fmt: skip
SYNC_FAULTS = (
    "loads nothing",
    "hides errors",
    "tells errors late",
    "saves before the pass",
    "saves behind a failed load",
)


@dataclass
class Copy:
    """A block's way."""

    number: int
    digest: bytes
    block: int
    request_id: str


@dataclass
class ToyMetadata:
    """What the scheduler's half orders."""

    loads: list[Copy] = field(default_factory=list)
    saves: list[Copy] = field(default_factory=list)
    holds: dict[str, list[int]] = field(default_factory=dict)
    lost: dict[str, list[int]] = field(default_factory=dict)
    has_fence: bool = False
    epoch: int = 0


@dataclass
class ToyReport:
    """What a worker has done: how many ranks have saved what."""

    saved: dict[int, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    lost: set[bytes] = field(default_factory=set)

    def aggregate(self, other: ToyReport) -> ToyReport:
        numbers = self.saved.keys() | other.saved.keys()
        saved = {number: self.saved.get(number, 0) + other.saved.get(number, 0) for number in numbers}
        return ToyReport(saved, self.failed | other.failed, self.lost | other.lost)


class ToyScheduler:
    """The scheduler's half."""

    def __init__(self, config: Any, fault: str, *, is_async: bool) -> None:
        self.fault, self.is_async = fault, is_async
        self.size = config.cache_config.block_size
        self.num_ranks = config.parallel_config.world_size
        self.known: set[bytes] = set()
        self.saving: dict[int, Copy] = {}
        self.num_saved: dict[int, int] = {}
        self.stale: set[int] = set()
        self.tables: dict[str, list[int]] = {}
        self.requests: dict[str, Any] = {}
        self.asked: dict[str, int] = {}
        self.taken: list[str] = []
        self.number = self.epoch = 0
        self.next = ToyMetadata()

    def name(self, request: Any, index: int) -> bytes:
        if self.fault == "names blocks without their parents":
            return repr(request.all_token_ids[index * self.size : (index + 1) * self.size]).encode()
        digest: bytes = request.block_hashes[index]
        return digest

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if self.fault == "takes on asking":
            self.taken.append(request.request_id)
        first = last = num_computed_tokens // self.size
        whole = self.fault == "answers the whole prompt"
        while last < (request.num_tokens - (not whole)) // self.size and self.name(request, last) in self.known:
            last += 1
        if self.fault == "answers once" and self.asked.get(request.request_id) == num_computed_tokens:
            last = first
        self.asked[request.request_id] = num_computed_tokens
        return (last - first) * self.size, self.is_async and last > first

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.requests[request.request_id] = request
        if self.fault == "takes on asking":
            self.taken.remove(request.request_id)
        if not num_external_tokens:
            return
        (ids,) = blocks.get_block_ids()
        first = self.asked[request.request_id] // self.size
        for index in range(first, first + num_external_tokens // self.size):
            self.number += 1
            copy = Copy(self.number, self.name(request, index), ids[index], request.request_id)
            self.next.loads.append(copy)

    def build_connector_meta(self, output: Any) -> ToyMetadata:
        if self.fault == "changes the output":
            output.finished_req_ids.add("me")
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
            self.save(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = []
            self.tables[request_id] += ids[0] if ids else []
            self.save(request_id, num_computed, output)
        ready, self.next = self.next, ToyMetadata()
        ready.has_fence = bool(output.preempted_req_ids) and self.fault != "forgets the fence"
        ready.epoch = self.epoch
        return ready

    def save(self, request_id: str, num_computed: int, output: Any) -> None:
        request = self.requests[request_id]
        last = (num_computed + output.num_scheduled_tokens[request_id]) // self.size
        for index in range(num_computed // self.size, min(last, len(request.block_hashes))):
            digest = self.name(request, index)
            if digest not in self.known and not any(copy.digest == digest for copy in self.saving.values()):
                self.number += 1
                copy = Copy(self.number, digest, self.tables[request_id][index], request_id)
                self.saving[self.number] = copy
                self.next.saves.append(copy)

    def update_connector_output(self, output: Any) -> None:
        report = output.kv_connector_worker_meta or ToyReport()
        for number, num_ranks in report.saved.items():
            self.num_saved[number] = self.num_saved.get(number, 0) + num_ranks
        for number in [number for number, num in self.num_saved.items() if num == self.num_ranks]:
            del self.num_saved[number]
            copy = self.saving.pop(number)
            if number not in report.failed | self.stale:
                self.known.add(copy.digest)
        self.stale |= report.failed
        if self.fault != "tries again for ever":
            self.known -= report.lost

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        if self.fault == "ends unknown requests badly":
            del self.requests[request.request_id]
        for known in (self.requests, self.tables, self.asked):
            known.pop(request.request_id, None)
        if request.request_id in self.taken and self.fault != "takes on asking":
            self.taken.remove(request.request_id)
        numbers = [copy.number for copy in self.saving.values() if copy.request_id == request.request_id]
        loads = [copy for copy in self.next.loads if copy.request_id == request.request_id]
        if not numbers or loads or self.fault == "holds nothing":
            return False, None
        self.next.holds[request.request_id] = numbers
        return self.fault != "sends what it does not hold", None

    def reset_cache(self) -> bool:
        if self.fault != "keeps on reset":
            self.known.clear()
            self.stale |= self.saving.keys()
            self.epoch += 1
        return True

    def has_pending_push_work(self) -> bool:
        return bool(self.saving or self.next.holds)


class ToyWorker:
    """One rank's half; its copies wait until somebody lets them go on."""

    def __init__(self, config: Any, fault: str, *, is_async: bool) -> None:
        self.fault, self.is_async = fault, is_async
        self.rank = config.parallel_config.rank
        self.kept: dict[bytes, list[Any]] = {}
        self.layers: list[Any] = []
        self.metadata: ToyMetadata | None = None
        self.waiting: list[tuple[bool, Copy]] = []  # whether it is a load
        self.loading: dict[str, set[int]] = {}
        self.holds: dict[str, set[int]] = {}
        self.report = ToyReport()
        self.bad: set[int] = set()
        self.late: set[int] = set()
        self.told: set[str] = set()
        self.epoch = 0

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.layers = [tensor.numpy() for tensor in kv_caches.values()]

    def bind_connector_metadata(self, metadata: ToyMetadata) -> None:
        self.metadata = metadata

    def clear_connector_metadata(self) -> None:
        self.metadata = None

    def has_connector_metadata(self) -> bool:
        return self.metadata is not None

    def handle_preemptions(self, metadata: ToyMetadata) -> None:
        if metadata.has_fence:
            for index in [i for i, (is_load, _) in enumerate(self.waiting) if not is_load][::-1]:
                self.go_on(index)
        if metadata.epoch != self.epoch:
            self.epoch = metadata.epoch
            if self.fault != "keeps on reset":
                self.kept.clear()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.metadata is not None
        for copy in self.metadata.loads:
            self.loading.setdefault(copy.request_id, set()).add(copy.number)
            self.waiting.append((True, copy))
            if not self.is_async:
                self.go_on(len(self.waiting) - 1)
        if self.fault == "saves before the pass":
            self.submit()

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        assert self.metadata is not None
        if self.fault != "saves before the pass":
            self.submit()
        self.holds.update((key, set(numbers)) for key, numbers in self.metadata.holds.items())

    def submit(self) -> None:
        assert self.metadata is not None
        is_void = bool(self.bad) and not self.is_async and self.fault != "saves behind a failed load"
        for copy in self.metadata.saves:
            if is_void:
                self.finish(copy, is_good=False)
            else:
                self.waiting.append((False, copy))
                if self.fault == "saves before the pass":
                    self.go_on(len(self.waiting) - 1)

    def finish(self, copy: Copy, *, is_good: bool) -> None:
        self.report.saved[copy.number] = 1
        self.report.failed |= set() if is_good else {copy.number}

    def go_on(self, index: int, *, fails: bool = False) -> None:
        is_load, copy = self.waiting.pop(index)
        if not is_load:
            if not fails:
                self.kept[copy.digest] = [layer[copy.block].copy() for layer in self.layers]
            self.finish(copy, is_good=not fails)
            return
        self.loading[copy.request_id].discard(copy.number)
        kept = None if fails else self.kept.get(copy.digest)
        if kept is None:
            self.report.lost.add(copy.digest)
            self.bad |= {copy.block} if self.fault != "hides errors" else set()
            return
        if self.fault == "loads nothing" or (self.fault == "forgets rank 1" and self.rank):
            return
        if self.fault == "loads a wrong block":
            kept = next(iter(self.kept.values()))
        for layer, data in zip(self.layers, kept, strict=True):
            layer[copy.block] = data
            if self.fault == "writes beyond its block":
                layer[copy.block - 1][0, 0, 0] = 7

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        is_early = self.fault == "reports received early"
        received = {key for key, numbers in self.loading.items() if is_early or not numbers}
        if self.fault == "reports received twice":
            received, self.told = received | self.told, received
        waiting = {copy.number for _, copy in self.waiting}
        self.loading = {key: numbers for key, numbers in self.loading.items() if key not in received}
        sent = {key for key, numbers in self.holds.items() if not numbers & waiting}
        sent = set() if self.fault == "leaks a hold" else sent
        for key in sent:
            del self.holds[key]
        return sent, received if self.is_async else set()

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self.bad = self.bad, set()
        if self.fault == "tells errors late":
            bad, self.late = self.late, bad
        return bad

    def build_connector_worker_meta(self) -> ToyReport:
        report, self.report = self.report, ToyReport()
        return report


class ToySchedules(ConnectorSchedules):
    """Schedules on the toy, right or with one fault."""

    timeout_s = 0.0

    def __init__(self, shape: EngineShape | None = None, *, fault: str = "", is_async: bool = True) -> None:
        self._make: Callable[[type, Any], Any] = lambda kind, config: kind(config, fault, is_async=is_async)
        super().__init__(shape)

    def make_connector(self, vllm_config: Any, role: str, kv_cache_config: Any) -> Any:
        return self._make(ToyWorker if role == "WORKER" else ToyScheduler, vllm_config)

    def worker(self, number: int) -> Any:
        return self.engine.worker_halves[number % len(self.engine.worker_halves)]

    def go_on(self, number: int) -> None:
        worker = self.worker(number)
        if worker.waiting:
            worker.go_on(number % len(worker.waiting))

    def fail(self, number: int) -> None:
        worker = self.worker(number)
        if worker.waiting:
            worker.go_on(number % len(worker.waiting), fails=True)

    def let_all_end(self) -> None:
        for worker in self.engine.worker_halves:
            while worker.waiting:
                worker.go_on(0)

    def evict(self, number: int) -> None:
        for worker in self.engine.worker_halves[number % 2 :]:
            for digest in list(worker.kept)[number % 3 :]:
                del worker.kept[digest]

    def check_idle(self) -> None:
        half = self.engine.scheduler_half
        assert not half.saving, half.saving
        assert not half.requests, half.requests
        assert not half.taken, f"it holds what was asked for: {half.taken}"
