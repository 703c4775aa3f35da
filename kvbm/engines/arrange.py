"""Builds the scheduler's half from what the workers told of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbm._backend import Backend
from kvbm.config import Config
from kvbm.engines.groups import Group
from kvbm.engines.shard import ShardDescription
from kvbm.engines.step_channel import StepChannels
from kvbm.errors import ConfigError
from kvbm.jobs.messages import decode_result
from kvbm.planner import Planner
from kvbm.pool import BlockPool
from kvbm.rules import limits_of, make_eviction_policy, make_offload_policy, ttls_of
from kvbm.types import Tier


def make_group(
    shards: Sequence[ShardDescription],
    *,
    index: int,
    window_blocks: int = 0,
    null_slot: int = -1,
    settings: Mapping[str, Any] | None = None,
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
    settings : mapping, optional
        Sections of the configuration, as one rank's `Shard` takes them: what is counted in bytes is of that rank.
    backend : Backend

    Raises
    ------
    ConfigError
        There is no tier below the engine's memory, or ranks differ in theirs, or in whether rank 0's are all ranks'; or
        a setting is impossible.
    PluginError
        A plug-in cannot be loaded.
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
    config = _read(settings or {}, block_nbytes=first.block_nbytes)
    channels = StepChannels(len(shards), is_shared=first.is_shared)
    for rank, shard in enumerate(shards[: len(channels.channels)]):
        for tier, data in shard.inventories.items():
            channels.know(rank, Tier(tier), decode_result(data))
    pools = [
        BlockPool(
            min(shard.num_blocks[tier] for shard in shards),
            name=f"{tier}-{index}",
            tier=Tier(tier),
            policy=make_eviction_policy(config, Tier(tier)),
            worker_id=config.runtime.worker_id,
            backend=backend,
        )
        for tier in first.num_blocks
    ]
    policies = [
        make_offload_policy(
            config,
            pool.tier,
            num_blocks=pool.total_blocks,
            slot_nbytes=max(shard.slot_nbytes.get(pool.tier.value, shard.block_nbytes) for shard in shards),
        )
        for pool in pools[1:]
    ]
    planner = Planner(
        pools,
        channels.channels,
        policies=policies,
        recording_tiers=[Tier(tier) for tier in first.recording],
        keyed_tiers=[Tier(tier) for tier in first.keyed],
        ttls_s=ttls_of(config, [pool.tier for pool in pools]),
        foreign_tier=Tier.DEVICE,
        limits=limits_of(config),
    )
    planner.restore()
    return Group(planner, channels, block_nbytes=first.block_nbytes, window_blocks=window_blocks, null_slot=null_slot)


def _read(settings: Mapping[str, Any], *, block_nbytes: int) -> Config:
    """Read the sections as a worker does; how many blocks its tiers have, it has told."""
    sizes = ("size", "num_blocks")
    sections = {name: {key: section[key] for key in section if key not in sizes} for name, section in settings.items()}
    model = {"num_layers": 1, "outer_dim": 1, "block_size": 1, "inner_dim": block_nbytes, "dtype": "uint8"}
    return Config.from_dict({**sections, "model": model})
