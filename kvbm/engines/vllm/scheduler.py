"""The connector in vLLM's scheduler: its requests and steps become calls of the scheduler's core."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import Any

import msgspec

from kvbm._backend import default_backend
from kvbm.engines.arrange import make_group
from kvbm.engines.counts import Counts, Data, read_groups
from kvbm.engines.explain_socket import ExplainSocket, open_explain
from kvbm.engines.groups import Group
from kvbm.engines.messages import StepOrders, StepReport, decode_report, encode_orders, encode_report
from kvbm.engines.reset_note import ResetNotes
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.shard import ShardDescription
from kvbm.engines.vllm.events import VllmEvents
from kvbm.engines.vllm.fingerprint import variant_of
from kvbm.engines.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm.engines.vllm.settings import (
    folder_of,
    hits_change_text,
    of_replica,
    part_of,
    read_settings,
    warn_of_policy,
    warn_of_random_names,
)
from kvbm.errors import ConfigError
from kvbm.types import Tier

_log = logging.getLogger("kvbm.engines")
_STEPS = 64  # that an engine has under way at most; the oldest are forgotten
_NULL_SLOT = 0  # vLLM's null block: where a window group has no block for a part of the prompt


class VllmScheduler:
    """What the connector does in the scheduler.

    Parameters
    ----------
    vllm_config : VllmConfig
    kv_cache_config : KVCacheConfig

    Raises
    ------
    ConfigError
        Groups of layers have blocks of different sizes, or a setting is unknown.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        sections, self._own = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._sections = of_replica(sections, vllm_config.parallel_config)
        warn_of_policy(vllm_config.kv_transfer_config)
        warn_of_random_names(self._sections, vllm_config.cache_config.prefix_caching_hash_algo)
        self._cache = kv_cache_config
        self._loads_in_step = self._own.get("loads", "async") == "sync"
        if self._loads_in_step and getattr(vllm_config.scheduler_config, "async_scheduling", False):
            _log.warning('loads are "async": steps that vLLM schedules ahead (async_scheduling) cannot load within')
            self._loads_in_step = False
        sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
        if len(sizes) != 1:
            raise ConfigError(f"this model's groups of layers have blocks of {sorted(sizes)} tokens, need one size")
        self._block_tokens: int = sizes.pop()
        self._has_no_use = hits_change_text(vllm_config)
        if self._has_no_use:
            _log.warning(
                "vLLM turned its prefix cache off: on this machine a text behind a hit is another one with this model; "
                "nothing is loaded or saved"
            )
        self._core: SchedulerCore | None = None  # made when the workers have told of their tiers
        self._groups: list[Group] = []
        self._clock = time.monotonic
        # Under way: begin, tokens of prompts, and whether anything is computed.
        self._steps: deque[tuple[float, int, bool]] = deque(maxlen=_STEPS)
        self._reported_at = -math.inf
        self._empty_reports: frozenset[bytes] = frozenset()  # of steps in which nothing ended
        self._requests: dict[str, Any] = {}
        self._asked: dict[str, int] = {}  # tokens that vLLM had when it asked last
        self._slots: dict[str, list[list[int]]] = {}  # by request, for each group
        self._due: dict[str, int] = {}  # by request, computed tokens from which on the core has something to save
        events_config = getattr(vllm_config, "kv_events_config", None)
        self._has_events = bool(events_config is not None and events_config.enable_kv_cache_events)
        self._events: VllmEvents | None = None
        path = self._sections.get("disk", {}).get("path")
        folders = [folder_of(path, index) for index in range(len(kv_cache_config.kv_cache_groups))] if path else []
        self._notes = ResetNotes(folders)
        self._explain: ExplainSocket | None = None
        self._counts = Counts(lambda: read_groups(self._groups), clock=self._clock)

    def connect(self, handshakes: dict[int, KvbmHandshake]) -> None:
        """Take over what the workers told of their tiers, and what outlived the last process."""
        by_rank = [handshakes[rank] for rank in sorted(handshakes)]
        for index, group in enumerate(self._cache.kv_cache_groups):
            window = getattr(group.kv_cache_spec, "sliding_window", None) or 0
            shards = [msgspec.msgpack.decode(one.shards[index], type=ShardDescription) for one in by_rank]
            self._groups.append(
                make_group(
                    shards,
                    index=index,
                    window_blocks=-(-(window - 1) // self._block_tokens) if window > 1 else 0,
                    null_slot=_NULL_SLOT,
                    settings=part_of(
                        self._sections,
                        group=index,
                        num_groups=len(self._cache.kv_cache_groups),
                        rank=0,
                        num_ranks=len(by_rank),
                        is_shared=shards[0].is_shared,
                        makes_folder=False,
                    ),
                    backend=default_backend(),
                )
            )
        self._core = SchedulerCore(
            self._groups,
            block_tokens=self._block_tokens,
            allow_weak_hashes=self._own.get("allow_weak_hashes", False),
            timeout_s=self._own.get("load_timeout_s", 10.0),
            loads_always=self._own.get("always_load", False),
            loads_in_step=self._loads_in_step,
        )
        empty: list[list[bytes]] = [[] for _ in self._groups]
        self._empty_reports = frozenset(
            encode_report(StepReport(rank=rank, results=empty)) for rank in range(len(by_rank))
        )
        self._take_notes_away()  # every worker has opened its tiers
        if self._has_events:
            self._events = VllmEvents(self._groups, block_tokens=self._block_tokens)
        if self._own.get("explain", True):
            self._explain = open_explain(self._core.history)

    # -- requests ----------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Count the tokens that can be loaded, and tell whether they come while the engine goes on."""
        if self._core is None or self._has_no_use:
            return 0, False
        is_first = request.request_id not in self._asked
        self._asked[request.request_id] = num_computed_tokens
        computes_all = getattr(request, "skip_reading_prefix_cache", False)  # for every token's logits
        return self._core.matched_tokens(
            request.request_id,
            request.block_hashes,
            num_tokens=0 if computes_all else request.num_tokens,
            num_computed_tokens=num_computed_tokens,
            variant=variant_of(getattr(request, "lora_request", None)) if is_first else 0,
        )

    def hit_sources(self, request: Any, num_external_tokens: int) -> dict[Tier, int]:
        """Divide what is loaded by the tier that it lies in."""
        return {} if self._core is None else self._core.sources(request.request_id, num_external_tokens)

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Begin to load into blocks that vLLM has found."""
        self._requests[request.request_id] = request
        if self._events is not None:
            self._events.named(request.block_hashes, is_new=True)  # before any of them comes up from a disk
        if self._core is None or not num_external_tokens:
            return
        slots = [list(ids) for ids in blocks.get_block_ids()]
        self._core.allocated(
            request.request_id,
            slots,
            num_computed_tokens=self._asked[request.request_id],
            num_external_tokens=num_external_tokens,
        )

    def finished(self, request: Any) -> bool:
        """End a request; return whether its blocks are still being saved."""
        self._requests.pop(request.request_id, None)
        self._slots.pop(request.request_id, None)
        self._due.pop(request.request_id, None)
        self._asked.pop(request.request_id, None)
        return self._core is not None and self._core.finished(request.request_id)

    # -- steps -------------------------------------------------------------------------------------------------

    def orders(self, output: Any) -> KvbmMetadata:
        """Give the workers' orders for a step."""
        if self._core is None:
            return KvbmMetadata(encode_orders(StepOrders()))
        for request_id in output.preempted_req_ids or ():
            self._core.preempted(request_id)
            self._due.pop(request_id, None)
        num_scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            self._slots[new.req_id] = [list(ids) for ids in new.block_ids]
            self._computed(new.req_id, new.num_computed_tokens + num_scheduled[new.req_id])
        cached = output.scheduled_cached_reqs
        for request_id, block_ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if block_ids is not None and request_id in cached.resumed_req_ids:
                self._slots[request_id] = [list(ids) for ids in block_ids]
                self._due.pop(request_id, None)
            elif block_ids is not None:
                for known, ids in zip(self._slots[request_id], block_ids, strict=True):
                    known.extend(ids)
            num_tokens = num_computed + num_scheduled[request_id]
            if num_tokens >= self._due.get(request_id, 0):
                self._computed(request_id, num_tokens)
        has_pass = output.total_num_scheduled_tokens > 0
        self._steps.append((self._clock(), _prompt_tokens(output), has_pass))
        return KvbmMetadata(encode_orders(self._core.orders()), has_pass=has_pass)

    def _computed(self, request_id: str, num_tokens: int) -> None:
        request = self._requests.get(request_id)
        if request is None or self._core is None or self._has_no_use:
            return
        if self._events is not None:
            self._events.named(request.block_hashes)
        self._due[request_id] = self._core.computed(
            request_id, request.block_hashes, self._slots[request_id], num_tokens=num_tokens
        )

    def reported(self, output: Any) -> None:
        """Take what the workers have done."""
        if self._core is None:
            return
        if self._steps:
            (began_at, num_tokens, has_pass), now = self._steps.popleft(), self._clock()
            if has_pass:
                self._core.speed.observe(num_tokens, now - max(began_at, self._reported_at))
            self._reported_at = now
        metadata = output.kv_connector_worker_meta
        if isinstance(metadata, KvbmWorkerMetadata):
            for report in metadata.reports:
                if report not in self._empty_reports:
                    self._core.reported(decode_report(report))
        self._core.received(output.finished_recving or ())
        self._core.sent(output.finished_sending or ())
        self._take_notes_away()

    @property
    def has_work(self) -> bool:
        """Whether steps are needed although vLLM has nothing to compute."""
        return self._core is not None and self._core.has_work

    # -- all of it ---------------------------------------------------------------------------------------------

    def reset(self) -> bool:
        """Forget every block below vLLM's own memory; return whether that was done."""
        if self._core is None:
            return True
        try:
            self._notes.put()
        except OSError as error:
            _log.warning("reset refused: it cannot be noted for a restart error=%r", error)
            return False
        if not self._core.reset():
            _log.info("reset refused: requests are loading blocks")
            self._take_notes_away()
            return False
        if self._events is not None:
            self._events.cleared()
        return True

    def _take_notes_away(self) -> None:
        if self._core is not None and self._notes.may_be_there and not self._core.is_forgetting:
            try:
                self._notes.take_away()
            except OSError as error:
                _log.warning("the note of a reset stays, a restart will forget error=%r", error)

    def take_events(self) -> list[Any]:
        """Give what happened in our tiers since the last call, as events of vLLM's."""
        return [] if self._events is None else self._events.take()

    def take_counts(self) -> Data | None:
        """Give what was counted since the last call; None while it is too early."""
        return None if self._core is None else self._counts.take()

    def close(self) -> None:
        """Let go of the books; the workers keep the bytes."""
        if self._explain is not None:
            self._explain.close()
        if self._core is not None:
            self._core.history.close()
        if self._events is not None:
            self._events.close()
        for group in self._groups:
            group.planner.close(0.0)
        self._core, self._groups = None, []


def _prompt_tokens(output: Any) -> int:
    """Count the tokens of prompts that a step computes; 0 where decoding takes most of it."""
    numbers = output.num_scheduled_tokens
    if len(numbers) == output.total_num_scheduled_tokens:  # one each
        return 0
    drafts = getattr(output, "scheduled_spec_decode_tokens", None) or {}
    num_prompt = sum([number for name, number in numbers.items() if number > 1 + len(drafts.get(name, ()))])
    return num_prompt if 2 * num_prompt > output.total_num_scheduled_tokens else 0
