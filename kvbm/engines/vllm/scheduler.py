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
from kvbm.engines.groups import Group
from kvbm.engines.messages import StepOrders, decode_report, encode_orders
from kvbm.engines.scheduler import SchedulerCore
from kvbm.engines.shard import ShardDescription
from kvbm.engines.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm.engines.vllm.settings import read_settings, warn_of_policy
from kvbm.errors import ConfigError

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
        _, self._own = read_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        warn_of_policy(vllm_config.kv_transfer_config)
        self._cache = kv_cache_config
        sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
        if len(sizes) != 1:
            raise ConfigError(f"this model's groups of layers have blocks of {sorted(sizes)} tokens, need one size")
        self._block_tokens: int = sizes.pop()
        self._core: SchedulerCore | None = None  # made when the workers have told of their tiers
        self._groups: list[Group] = []
        self._clock = time.monotonic
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS)  # under way: begin, and tokens of prompts
        self._reported_at = -math.inf
        self._requests: dict[str, Any] = {}
        self._asked: dict[str, int] = {}  # tokens that vLLM had when it asked last
        self._slots: dict[str, list[list[int]]] = {}  # by request, for each group

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
                    backend=default_backend(),
                )
            )
        self._core = SchedulerCore(
            self._groups,
            block_tokens=self._block_tokens,
            allow_weak_hashes=self._own.get("allow_weak_hashes", False),
            timeout_s=self._own.get("load_timeout_s", 10.0),
        )

    # -- requests ----------------------------------------------------------------------------------------------

    def matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Count the tokens that can be loaded; they come while the engine goes on."""
        if self._core is None:
            return 0, False
        self._asked[request.request_id] = num_computed_tokens
        num_tokens = self._core.matched_tokens(
            request.request_id,
            request.block_hashes,
            num_tokens=request.num_tokens,
            num_computed_tokens=num_computed_tokens,
        )
        return num_tokens, num_tokens > 0

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Begin to load into blocks that vLLM has found."""
        self._requests[request.request_id] = request
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
        self._asked.pop(request.request_id, None)
        return self._core is not None and self._core.finished(request.request_id)

    # -- steps -------------------------------------------------------------------------------------------------

    def orders(self, output: Any) -> KvbmMetadata:
        """Give the workers' orders for a step."""
        if self._core is None:
            return KvbmMetadata(encode_orders(StepOrders()))
        for request_id in output.preempted_req_ids or ():
            self._core.preempted(request_id)
        for new in output.scheduled_new_reqs:
            self._slots[new.req_id] = [list(ids) for ids in new.block_ids]
            self._computed(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, block_ids, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if block_ids is not None and request_id in cached.resumed_req_ids:
                self._slots[request_id] = [list(ids) for ids in block_ids]
            elif block_ids is not None:
                for known, ids in zip(self._slots[request_id], block_ids, strict=True):
                    known.extend(ids)
            self._computed(request_id, num_computed, output)
        self._steps.append((self._clock(), _prompt_tokens(output)))
        return KvbmMetadata(encode_orders(self._core.orders()))

    def _computed(self, request_id: str, num_computed_tokens: int, output: Any) -> None:
        request = self._requests.get(request_id)
        if request is None or self._core is None:
            return
        num_tokens = num_computed_tokens + output.num_scheduled_tokens[request_id]
        self._core.computed(request_id, request.block_hashes, self._slots[request_id], num_tokens=num_tokens)

    def reported(self, output: Any) -> None:
        """Take what the workers have done."""
        if self._core is None:
            return
        if self._steps:
            (began_at, num_tokens), now = self._steps.popleft(), self._clock()
            self._core.speed.observe(num_tokens, now - max(began_at, self._reported_at))
            self._reported_at = now
        metadata = output.kv_connector_worker_meta
        if isinstance(metadata, KvbmWorkerMetadata):
            for report in metadata.reports:
                self._core.reported(decode_report(report))
        self._core.received(output.finished_recving or ())
        self._core.sent(output.finished_sending or ())

    @property
    def has_work(self) -> bool:
        """Whether steps are needed although vLLM has nothing to compute."""
        return self._core is not None and self._core.has_work

    def close(self) -> None:
        """Let go of the books; the workers keep the bytes."""
        for group in self._groups:
            group.planner.close(0.0)
        self._core, self._groups = None, []


def _prompt_tokens(output: Any) -> int:
    """Count the tokens of prompts that a step computes; 0 where decoding takes most of it."""
    numbers = output.num_scheduled_tokens.values()
    num_prompt = sum([number for number in numbers if number > 1])
    return num_prompt if 2 * num_prompt > output.total_num_scheduled_tokens else 0
