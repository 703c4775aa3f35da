"""The sections of the tree: one frozen Struct each, checked when it is made.

A tier is absent when it has neither `num_blocks` nor `size`. Each key's type, limits and description stand here once;
messages, the JSON schema and the documentation read them from the annotations.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from kvbm.config.durations import DURATION_ADVICE, DURATION_PATTERN
from kvbm.config.fields import MAX_INTEGER, OWN_NAMES, Section, key, refused
from kvbm.config.sizes import SIZE_ADVICE, SIZE_PATTERN
from kvbm.layout import DTYPES
from kvbm.types import DEFAULT_PRIORITY, MAX_PRIORITY

LAYOUTS = OWN_NAMES["layout"]
BACKENDS = ("auto", "native", "pure")
DEVICES = ("auto", "cuda", "cpu", "simulated")
MAX_BLOCKS = 2**31 - 2  # what a store can number
MAX_THREAD_BLOCKS = 65535  # more than any GPU runs at once

PositiveInt = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
NaturalInt = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Integer = Annotated[int, Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]
BlockCount = Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Priority = Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]
Text = Annotated[str, Meta(min_length=1)]
SizeText = Annotated[str, Meta(pattern=SIZE_PATTERN)]
DurationText = Annotated[str, Meta(pattern=DURATION_PATTERN)]
OffloadPolicyName = Annotated[
    str | None, key("What is offloaded to this tier; left out, what offload.policy says.", plugin="offload")
]

REMOTE_BLOCKS = 1 << 18  # remembered of a store, unless remote.num_blocks says otherwise; some 100 bytes each

_COUNT = "1 or more"
_TTL = f"{DURATION_ADVICE}, or leave it out"
_SECONDS = "seconds, more than 0"
_SHARE = "a share, more than 0 and at most 1"
_SWITCH = "true or false"
_TEXT = "text that is not empty"
_TIER_COUNT = "1 or more, or leave the tier out"
_TIER_SIZE = f"{SIZE_ADVICE}, or leave the tier out"


class RuntimeConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Threads and deadlines of one worker (section ``runtime``)."""

    section: ClassVar[str] = "runtime"

    worker_id: Annotated[Text, key("Name of this worker, put into events.", _TEXT)] = "0"
    backend: Annotated[
        str, key("The twin that does the bookkeeping and the copies; auto asks KVBM_BACKEND.", choices=BACKENDS)
    ] = "auto"
    copy_threads: Annotated[
        NaturalInt, key("Threads that copy blocks; 0 takes as many as there are cores, at most 4.", "0 or more")
    ] = 0
    io_threads: Annotated[PositiveInt, key("Threads that read and write the disk tier.", _COUNT)] = 4
    rank: Annotated[NaturalInt, key("This worker's rank: its shard of each block is its own.", "0 or more")] = 0
    num_ranks: Annotated[PositiveInt, key("Ranks that share a model.", _COUNT)] = 1
    onboard_timeout_s: Annotated[Seconds, key("Seconds after which onboarding ends for its waiter.", _SECONDS)] = 30.0
    offload_timeout_s: Annotated[Seconds, key("Seconds after which an offload job is given up.", _SECONDS)] = 30.0
    close_timeout_s: Annotated[Seconds, key("Seconds that closing waits for work under way.", _SECONDS)] = 10.0
    small_copy: Annotated[
        NaturalInt | SizeText,
        key("A hit of up to this size, between memories, is copied in the caller's thread.", SIZE_ADVICE, is_size=True),
    ] = 1 << 20

    @property
    def small_copy_nbytes(self) -> int:
        """`small_copy` in bytes."""
        return int(self.small_copy)


class ModelConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape and identity of a model's KV cache (section ``model``).

    In files, dicts and the environment `block_size` may be called ``page_size``.
    """

    section: ClassVar[str] = "model"

    num_layers: Annotated[PositiveInt, key("Layers that have a KV cache.", _COUNT)]
    inner_dim: Annotated[PositiveInt, key("Elements of one token's K (or V) in one layer: heads * head size.", _COUNT)]
    outer_dim: Annotated[PositiveInt, key("2 for K and V, 1 for MLA.", _COUNT)] = 2
    block_size: Annotated[PositiveInt, key("Tokens in a block.", _COUNT)] = 64
    dtype: Annotated[str, key("Element type.", choices=tuple(DTYPES))] = "float16"
    num_heads: Annotated[PositiveInt, key("KV heads; needed only to reorder blocks by head.", _COUNT)] = 1
    fingerprint: Annotated[
        Text | None, key("Names the model: a part of every sequence hash, so two models never share a block.", _TEXT)
    ] = None
    weights_epoch: Annotated[
        Integer | Text | None, key("Changes every hash when weights are updated in place.", "a 64-bit integer or text")
    ] = None

    @property
    def page_size(self) -> int:
        """`block_size` by its other name."""
        return self.block_size

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block, without padding."""
        return self.num_layers * self.outer_dim * self.block_size * self.inner_dim * DTYPES[self.dtype][0]

    def _check_together(self) -> None:
        if self.inner_dim % self.num_heads:
            raise refused(
                f"model.inner_dim is {self.inner_dim}, give a multiple of model.num_heads ({self.num_heads})",
                "model.inner_dim",
                "model.num_heads",
            )


class TierConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the three tiers have in common; absent without `num_blocks` and `size`."""

    num_blocks: Annotated[
        BlockCount | None, key("Blocks of this tier; give this or size.", _TIER_COUNT, most=MAX_BLOCKS)
    ] = None
    size: Annotated[
        PositiveInt | SizeText | None,
        key("Bytes of this tier, from which the number of blocks follows.", _TIER_SIZE, is_size=True),
    ] = None
    layout: Annotated[str, key("How blocks lie in memory: one of three, or a plug-in.", plugin="layout")] = (
        "fully_contiguous"
    )
    eviction: Annotated[str, key("Eviction policy: lru, fifo or a plug-in.", plugin="eviction")] = "lru"
    allocator: Annotated[str, key("Where memory comes from: default or a plug-in.", plugin="allocator")] = "default"
    ttl: Annotated[
        Seconds | DurationText | None,
        key("A block that nobody uses for so long leaves this tier; left out, none does.", _TTL, is_duration=True),
    ] = None

    @property
    def nbytes(self) -> int | None:
        """`size` in bytes."""
        return None if self.size is None else int(self.size)

    @property
    def ttl_s(self) -> float | None:
        """`ttl` in seconds."""
        return None if self.ttl is None else float(self.ttl)

    @property
    def is_present(self) -> bool:
        """Whether blocks were asked for."""
        return self.num_blocks is not None or self.size is not None

    def _check_together(self) -> None:
        if self.num_blocks is not None and self.size is not None:
            both = (f"{self.section}.num_blocks", f"{self.section}.size")
            raise refused(f"{both[0]} is {self.num_blocks} and {both[1]} is {self.size}, give only one of them", *both)


class DeviceConfig(TierConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device tier, G1 (section ``device``)."""

    section: ClassVar[str] = "device"

    kind: Annotated[
        str,
        key(
            "What holds this tier: a GPU (cuda), host memory in its place (cpu), or the simulated GPU of tests; auto "
            "asks KVBM_DEVICE, and takes a GPU where there is one. Naming a GPU asks for the tier: without num_blocks "
            "and size it takes gpu_memory_fraction.",
            choices=DEVICES,
        ),
    ] = "auto"
    index: Annotated[NaturalInt, key("Which GPU, as CUDA numbers those that are visible.", "0 or more")] = 0
    gpu_memory_fraction: Annotated[
        Share,
        key(
            "Share to take of the GPU's memory that is free when the manager is made, where kind is cuda and neither "
            "num_blocks nor size is given.",
            _SHARE,
        ),
    ] = 0.9
    copy_thread_blocks: Annotated[
        int,
        Meta(ge=0, le=MAX_THREAD_BLOCKS),
        key(
            "Thread blocks of the GPU that a copy kernel takes at most, from what else runs there; 0 takes a few.",
            f"0 to {MAX_THREAD_BLOCKS}",
        ),
    ] = 0

    @property
    def is_present(self) -> bool:
        """Whether blocks were asked for: by their number or size, or as a share of a GPU that is named."""
        return super().is_present or self.takes_share

    @property
    def takes_share(self) -> bool:
        """Whether the number of blocks follows from `gpu_memory_fraction`."""
        return self.num_blocks is None and self.size is None and self.kind in ("cuda", "simulated")


class HostConfig(TierConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host memory tier, G2 (section ``host``)."""

    section: ClassVar[str] = "host"

    offload_policy: OffloadPolicyName = None
    huge_pages: Annotated[bool, key("Ask the system for huge pages.", _SWITCH)] = True


class DiskConfig(TierConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The disk tier, G3 (section ``disk``)."""

    section: ClassVar[str] = "disk"

    path: Annotated[
        Text | None,
        key("Directory that holds the blocks; offload_path at the top means it too.", "a directory", is_path=True),
    ] = None
    offload_policy: OffloadPolicyName = None
    write_budget: Annotated[
        NaturalInt | SizeText,
        key(
            "Bytes a day that may be written here; what goes beyond is dropped; 0 sets no limit.",
            f"{SIZE_ADVICE}, 0 for no limit",
            is_size=True,
        ),
    ] = 0
    slab: Annotated[
        Text | None, key("Name of this rank's slab; several share a directory; left out, rank0 and so on.", _TEXT)
    ] = None
    on_mismatch: Annotated[
        str,
        key(
            "What to do with a slab of another model or layout: refuse it, or replace it.",
            choices=("refuse", "replace"),
        ),
    ] = "refuse"
    sync_interval_s: Annotated[Seconds, key("A power cut loses at most what came in this time.", _SECONDS)] = 1.0
    engine: Annotated[
        str,
        key(
            "What moves blocks; auto takes what a short probe shows to be faster or cheaper.",
            choices=("auto", "uring", "threads", "python"),
        ),
    ] = "auto"
    depth: Annotated[int, Meta(ge=1, le=1024), key("Reads and writes under way at once.", "1 to 1024")] = 32
    direct_io: Annotated[bool, key("Go around the page cache where the file system allows.", _SWITCH)] = True
    max_queued_size: Annotated[
        PositiveInt | SizeText,
        key("Bytes of reads, and as many of writes, that may be under way at once.", _TIER_SIZE, is_size=True),
    ] = 256 << 20

    @property
    def write_budget_nbytes(self) -> int:
        """`write_budget` in bytes a day; 0 is no limit."""
        return int(self.write_budget)

    @property
    def max_queued_nbytes(self) -> int:
        """`max_queued_size` in bytes."""
        return int(self.max_queued_size)

    def _check_together(self) -> None:
        super()._check_together()
        if self.is_present and self.path is None:
            raise refused(
                "disk.path is not given, a disk tier needs the directory that holds its blocks: give disk.path (or "
                "offload_path), or leave disk.num_blocks and disk.size out",
                "disk.num_blocks",
                "disk.size",
            )


class RemoteConfig(TierConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The object store tier, G4 (section ``remote``)."""

    section: ClassVar[str] = "remote"

    url: Annotated[
        Text | None,
        key("Where blocks are kept: s3://bucket/folder, gs://, az://, file:///directory or memory://.", "a URL"),
    ] = None
    prefix: Annotated[str, key("Folder under the URL.", "a relative path")] = "kvbm"
    endpoint: Annotated[Text | None, key("Address of the server, where it is not the provider's own.", "a URL")] = None
    region: Annotated[Text | None, key("Region of the bucket.", _TEXT)] = None
    allow_http: Annotated[bool, key("Let the endpoint be reached without TLS.", _SWITCH)] = False
    offload_policy: OffloadPolicyName = None
    max_concurrency: Annotated[PositiveInt, key("Requests under way at once.", _COUNT)] = 32
    request_timeout_s: Annotated[Seconds, key("Time of one request.", _SECONDS)] = 5.0
    probe_blocks: Annotated[
        PositiveInt,
        key("Blocks that one request missed and the store is asked for first; as long as all are there, more.", _COUNT),
    ] = 64
    absent_s: Annotated[Seconds, key("Time until a block that was absent is asked for again.", _SECONDS)] = 10.0
    known_s: Annotated[
        Seconds, key("Time until a block that was there is asked for again, in the background.", _SECONDS)
    ] = 21600.0
    away_s: Annotated[Seconds, key("Time that a store which cannot be reached is left alone.", _SECONDS)] = 5.0

    @property
    def is_present(self) -> bool:
        """Whether a store was named."""
        return self.url is not None

    def _check_together(self) -> None:
        super()._check_together()
        if self.size is not None:
            raise refused(
                "remote.size is given, but a store has no size of ours: leave it out (remote.num_blocks bounds how "
                "many blocks are remembered as being there)",
                "remote.size",
            )
        if self.url is None and self.num_blocks is not None:
            raise refused(
                "remote.num_blocks is given without remote.url: give the URL of the store", "remote.num_blocks"
            )


class OffloadConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes down, how much at a time, and its limits (section ``offload``)."""

    section: ClassVar[str] = "offload"

    policy: Annotated[
        str, key("What is offloaded: always, second_use, priority, tinylfu or a plug-in.", plugin="offload")
    ] = "always"
    queue_blocks: Annotated[PositiveInt, key("Blocks that may wait; what does not fit is dropped.", _COUNT)] = 8192
    job_blocks: Annotated[PositiveInt, key("Blocks of one job.", _COUNT)] = 64
    route_jobs: Annotated[PositiveInt, key("Jobs of one route under way at once.", _COUNT)] = 4
    in_flight_share: Annotated[Share, key("Share of a pool that jobs under way may hold.", _SHARE)] = 0.25
    pin_share: Annotated[Share, key("Share of a tier that may be pinned.", _SHARE)] = 0.25
    prefetch_blocks: Annotated[PositiveInt, key("Blocks that prefetches may bring at once.", _COUNT)] = 1024
    staging_blocks: Annotated[
        NaturalInt,
        key(
            "Blocks of the ring that bytes pass through on their way to and from disk and network; 0 takes 32 MiB, "
            "at least 16 blocks.",
            "0 or more",
        ),
    ] = 0
    verify_checksums: Annotated[bool, key("Check every block on its way up.", _SWITCH)] = True
    lineage_blocks: Annotated[
        PositiveInt, key("Blocks remembered to keep parents younger than their children in lower tiers.", _COUNT)
    ] = 1 << 18
    touch_calls: Annotated[PositiveInt, key("Hits that may wait until lower tiers are told of them.", _COUNT)] = 4096
    use_count_blocks: Annotated[PositiveInt, key("Blocks that the second_use policy remembers.", _COUNT)] = 65536
    min_priority: Annotated[
        Priority, key("Lowest priority that the priority policy offloads.", f"0 to {MAX_PRIORITY}")
    ] = DEFAULT_PRIORITY + 1  # one above what blocks have by default
