"""Builds the scheduler's half from what the workers told of themselves."""

from __future__ import annotations

from collections.abc import Sequence

from kvbm._backend import Backend
from kvbm.engines.groups import Group
from kvbm.engines.shard import ShardDescription
from kvbm.engines.step_channel import StepChannels
from kvbm.errors import ConfigError
from kvbm.jobs.messages import decode_result
from kvbm.planner import Limits, Planner
from kvbm.pool import BlockPool
from kvbm.types import Tier


def make_group(
    shards: Sequence[ShardDescription],
    *,
    index: int,
    window_blocks: int = 0,
    null_slot: int = -1,
    limits: Limits | None = None,
    backend: Backend,
) -> Group:
    """Make the bookkeeping of one group of layers, and take over what outlived the last process.

    Parameters
    ----------
    shards : sequence of ShardDescription
        Of this group, one for each rank.
    index : int
        Of the group, for names.
    window_blocks, null_slot : int
        See `Group`.
    limits : Limits, optional
    backend : Backend

    Raises
    ------
    ConfigError
        There is no tier below the engine's memory, or ranks differ in theirs, or in whether rank 0's are all ranks'.
    """
    first = shards[0]
    for rank, shard in enumerate(shards):
        if (shard.num_blocks.keys(), shard.recording, shard.keyed) != (
            first.num_blocks.keys(),
            first.recording,
            first.keyed,
        ):
            raise ConfigError(f"rank {rank} has the tiers {list(shard.num_blocks)}, rank 0 {list(first.num_blocks)}")
    if "host" not in first.num_blocks:
        raise ConfigError('a connector needs a host tier: give it memory, as {"host": "20GiB"}')
    if len({shard.is_shared for shard in shards}) > 1:
        sharing = [rank for rank, shard in enumerate(shards) if shard.is_shared]
        raise ConfigError(f"ranks {sharing} of {len(shards)} share one host tier: give all the same settings")
    channels = StepChannels(len(shards), is_shared=first.is_shared)
    for rank, shard in enumerate(shards[: len(channels.channels)]):
        for tier, data in shard.inventories.items():
            channels.know(rank, Tier(tier), decode_result(data))
    pools = [
        BlockPool(
            min(shard.num_blocks[tier] for shard in shards), name=f"{tier}-{index}", tier=Tier(tier), backend=backend
        )
        for tier in first.num_blocks
    ]
    planner = Planner(
        pools,
        channels.channels,
        recording_tiers=[Tier(tier) for tier in first.recording],
        keyed_tiers=[Tier(tier) for tier in first.keyed],
        foreign_tier=Tier.DEVICE,
        limits=limits,
    )
    planner.restore()
    return Group(planner, channels, block_nbytes=first.block_nbytes, window_blocks=window_blocks, null_slot=null_slot)
