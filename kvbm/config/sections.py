"""The sections of the tree: one frozen Struct each, checked when it is made.

A tier is absent when it has neither `num_blocks` nor `size`. Each key's type, limits and description stand here once;
messages, the JSON schema and the documentation read them from the annotations.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from kvbm.config.fields import MAX_INTEGER, OWN_NAMES, Section, key, refused
from kvbm.config.sizes import SIZE_ADVICE, SIZE_PATTERN
from kvbm.layout import DTYPES
from kvbm.types import DEFAULT_PRIORITY, MAX_PRIORITY

LAYOUTS = OWN_NAMES["layout"]
BACKENDS = ("auto", "native", "pure")
MAX_BLOCKS = 2**31 - 2  # what a store can number

PositiveInt = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
NaturalInt = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Integer = Annotated[int, Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]
BlockCount = Annotated[int, Meta(ge=1, le=MAX_BLOCKS)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Priority = Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]
Text = Annotated[str, Meta(min_length=1)]
SizeText = Annotated[str, Meta(pattern=SIZE_PATTERN)]

_COUNT = "1 or more"
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

    @property
    def nbytes(self) -> int | None:
        """`size` in bytes."""
        return None if self.size is None else int(self.size)

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

    gpu_memory_fraction: Annotated[
        Share, key("Share of the GPU's memory to take where neither num_blocks nor size is given.", _SHARE)
    ] = 0.9


class HostConfig(TierConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The host memory tier, G2 (section ``host``)."""

    section: ClassVar[str] = "host"

    huge_pages: Annotated[bool, key("Ask the system for huge pages.", _SWITCH)] = True


class DiskConfig(TierConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The disk tier, G3 (section ``disk``)."""

    section: ClassVar[str] = "disk"

    path: Annotated[
        Text | None,
        key("Directory that holds the blocks; offload_path at the top means it too.", "a directory", is_path=True),
    ] = None
    direct_io: Annotated[bool, key("Go around the page cache where the file system allows.", _SWITCH)] = True
    max_queued_size: Annotated[
        PositiveInt | SizeText,
        key("Bytes of reads, and as many of writes, that may be under way at once.", _TIER_SIZE, is_size=True),
    ] = 256 << 20

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


class OffloadConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes down, how much at a time, and its limits (section ``offload``)."""

    section: ClassVar[str] = "offload"

    policy: Annotated[str, key("What is offloaded: always, second_use, priority or a plug-in.", plugin="offload")] = (
        "always"
    )
    queue_blocks: Annotated[PositiveInt, key("Blocks that may wait; what does not fit is dropped.", _COUNT)] = 8192
    job_blocks: Annotated[PositiveInt, key("Blocks of one job.", _COUNT)] = 64
    route_jobs: Annotated[PositiveInt, key("Jobs of one route under way at once.", _COUNT)] = 4
    in_flight_share: Annotated[Share, key("Share of a pool that jobs under way may hold.", _SHARE)] = 0.25
    staging_blocks: Annotated[
        PositiveInt, key("Blocks of the ring that bytes pass through on their way to and from disk.", _COUNT)
    ] = 16
    verify_checksums: Annotated[bool, key("Check every block on its way up.", _SWITCH)] = True
    lineage_blocks: Annotated[
        PositiveInt, key("Blocks remembered to keep parents younger than their children in lower tiers.", _COUNT)
    ] = 1 << 18
    touch_calls: Annotated[PositiveInt, key("Hits that may wait until lower tiers are told of them.", _COUNT)] = 4096
    use_count_blocks: Annotated[PositiveInt, key("Blocks that the second_use policy remembers.", _COUNT)] = 65536
    min_priority: Annotated[
        Priority, key("Lowest priority that the priority policy offloads.", f"0 to {MAX_PRIORITY}")
    ] = DEFAULT_PRIORITY + 1  # one above what blocks have by default
