"""What a scheduler of vLLM shows a connector: requests, blocks, a step's output; attributes as vLLM's have."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1
NULL_BLOCK = 0


class Status(enum.IntEnum):
    """Where a request is, as vLLM's RequestStatus says; everything from FINISHED_STOPPED on has ended."""

    WAITING = 1
    WAITING_FOR_REMOTE_KVS = 2
    RUNNING = 3
    PREEMPTED = 4
    FINISHED_STOPPED = 5
    FINISHED_ABORTED = 6
    FINISHED_ERROR = 7

    @staticmethod
    def is_finished(status: Status) -> bool:
        """Tell whether a request of this status has ended."""
        return status >= Status.FINISHED_STOPPED


class FakeRequest:
    """One request.

    Parameters
    ----------
    request_id : str
    prompt : sequence of int
    max_tokens : int
        That it generates, 1 or more.
    salt : str, optional
        Keeps its blocks apart from those of others with the same tokens.
    block_tokens : int

    Attributes
    ----------
    all_token_ids : list of int
    block_hashes : list of bytes
        Of all full blocks, 32 bytes each, each over all that is before it.
    num_computed_tokens : int
    tables : list of list of int
        For each group its blocks; 0 where it needs none.
    chain : list of int
        For each token a number that stands for all tokens up to it: what its bytes derive from.
    promised : (int, int)
        First and last block of the load under way, or of the last one.
    contents : dict
        What its tokens are in memory, for each rank, group and epoch.
    """

    def __init__(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int, salt: str | None, block_tokens: int
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt)
        self.all_token_ids: list[int] = []
        self.output_token_ids: list[int] = []
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.max_tokens = max_tokens
        self.cache_salt = salt
        self.block_hashes: list[bytes] = []
        self.num_computed_tokens = 0
        self.num_preemptions = 0
        self.num_external_computed_tokens = 0
        self.status = Status.WAITING
        self.kv_transfer_params: dict[str, Any] | None = None
        self.lora_request = None
        self.mm_features: list[Any] = []
        self.sampling_params = None
        self.pooling_params = None
        self.arrival_time = 0.0
        self.priority = 0
        self.client_index = 0
        self.skip_reading_prefix_cache = False
        self.tables: list[list[int]] = []
        self.chain: list[int] = []
        self.promised = 0, 0
        self.contents: dict[tuple[int, int, int], npt.NDArray[np.uint16]] = {}
        self._block_tokens = block_tokens
        for token in self.prompt_token_ids:
            self._append(token)

    def __repr__(self) -> str:
        return f"<{self.request_id} {self.status.name} {self.num_computed_tokens} of {self.num_tokens} tokens>"

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """All tokens; nothing is guessed here."""
        return self.num_tokens

    def is_finished(self) -> bool:
        """Tell whether it has ended."""
        return Status.is_finished(self.status)

    def generate(self) -> None:
        """Append the token that a model would: it depends on all before it."""
        token = self.chain[-1] % 97
        self.output_token_ids.append(token)
        self._append(token)

    def _append(self, token: int) -> None:
        before = self.chain[-1] if self.chain else _root(self.cache_salt)
        mixed = ((before ^ (token + 1)) * 0x9E3779B97F4A7C15) & _MASK
        self.chain.append(mixed ^ (mixed >> 29))
        self.all_token_ids.append(token)
        if len(self.all_token_ids) % self._block_tokens == 0:
            parent = self.block_hashes[-1] if self.block_hashes else (self.cache_salt or "").encode()
            tokens = repr(self.all_token_ids[-self._block_tokens :]).encode()
            self.block_hashes.append(hashlib.sha256(parent + b"/" + tokens).digest())


def _root(salt: str | None) -> int:
    return int.from_bytes(hashlib.blake2b((salt or "").encode(), digest_size=8).digest(), "little")


@dataclass
class KVCacheBlock:
    """One block of a request."""

    block_id: int

    @property
    def is_null(self) -> bool:
        """Whether it stands for a block that is not needed."""
        return self.block_id == NULL_BLOCK


class KVCacheBlocks:
    """The blocks of a request.

    Parameters
    ----------
    tables : sequence of sequence of int
        Block ids of each group.
    """

    def __init__(self, tables: Sequence[Sequence[int]]) -> None:
        self._ids = tuple(list(table) for table in tables)

    @property
    def blocks(self) -> tuple[list[KVCacheBlock], ...]:
        """Block objects of each group."""
        return tuple([KVCacheBlock(one) for one in ids] for ids in self._ids)

    def get_block_ids(self, allow_none: bool = False) -> tuple[list[int], ...] | None:
        """Give the ids of each group; None where there are none and that is allowed."""
        return None if allow_none and not any(self._ids) else tuple(list(ids) for ids in self._ids)

    def get_unhashed_block_ids(self) -> list[int]:
        """Give the ids of the first group."""
        return list(self._ids[0])


@dataclass
class NewRequestData:
    """A request that is scheduled for the first time."""

    req_id: str
    prompt_token_ids: list[int]
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    mm_features: list[Any] = field(default_factory=list)
    sampling_params: Any = None
    pooling_params: Any = None
    lora_request: Any = None


@dataclass
class CachedRequestData:
    """Requests that were scheduled before; one entry of each list for each."""

    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_token_ids: list[list[int]] = field(default_factory=list)
    all_token_ids: dict[str, list[int]] = field(default_factory=dict)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)

    @property
    def num_reqs(self) -> int:
        """Requests."""
        return len(self.req_ids)


@dataclass
class KVConnectorBlockState:
    """The blocks of requests, for the scheduler's half only."""

    req_ids: set[str]
    resolve_block_ids: Callable[[str], tuple[list[int], ...]]
    boundary_state_offloads: dict[str, Any] = field(default_factory=dict)


@dataclass
class SchedulerOutput:
    """What a step computes."""

    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: CachedRequestData
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    preempted_req_ids: set[str]
    finished_req_ids: set[str]
    has_sync_kv_loads: bool
    kv_connector_block_state: KVConnectorBlockState | None = None
    kv_connector_metadata: Any = None
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    scheduled_encoder_inputs: dict[str, list[int]] = field(default_factory=dict)
    free_encoder_mm_hashes: list[str] = field(default_factory=list)
    new_block_ids_to_zero: list[int] | None = None


@dataclass
class ConnectorOutput:
    """What the workers' halves said after a step, put together as vLLM's KVConnectorOutput."""

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    failed_recving: set[str] = field(default_factory=set)
    invalid_block_ids: set[int] = field(default_factory=set)
    kv_connector_worker_meta: Any = None
    kv_connector_stats: Any = None
    kv_cache_events: Any = None
    expected_finished_count: int = 0

    def is_empty(self) -> bool:
        """Tell whether nothing was said."""
        return not (
            self.finished_sending
            or self.finished_recving
            or self.failed_recving
            or self.invalid_block_ids
            or self.kv_connector_worker_meta
        )


@dataclass
class Pass:
    """What a step computes of a request."""

    request: FakeRequest
    tokens: range
    tables: list[list[int]]
    sync_tokens: range = range(0)  # that are loaded in this step


@dataclass
class Step:
    """One step: what the connector is told, and what the workers do."""

    output: Any = None
    passes: list[Pass] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # blocks that are overwritten once the step may begin
    stale: list[int] = field(default_factory=list)  # blocks to be loaded that nobody can be reading any more
    opened: list[int] = field(default_factory=list)  # blocks to be loaded while the engine goes on
