"""What a configuration says of bookkeeping: limits, what goes down, what leaves a tier and when.

A manager asks it for tiers of its own process, an engine's connector for tiers whose bytes lie with the workers.
Stateless; knows no storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvbm.config import Config
from kvbm.errors import ConfigError
from kvbm.planner import Limits, OffloadPolicy
from kvbm.planner.policies import WriteBudget
from kvbm.plugins import load_plugin
from kvbm.types import Tier


def limits_of(config: Config) -> Limits:
    """Give what may wait, move and take time at once.

    Parameters
    ----------
    config : Config
    """
    offload, runtime = config.offload, config.runtime
    return Limits(
        queue_blocks=offload.queue_blocks,
        job_blocks=offload.job_blocks,
        route_jobs=offload.route_jobs,
        lineage_blocks=offload.lineage_blocks,
        touch_calls=offload.touch_calls,
        in_flight_share=offload.in_flight_share,
        pin_share=offload.pin_share,
        prefetch_blocks=offload.prefetch_blocks,
        probe_blocks=config.remote.probe_blocks,
        absent_s=config.remote.absent_s,
        known_s=config.remote.known_s,
        away_s=config.remote.away_s,
        onboard_timeout_s=runtime.onboard_timeout_s,
        offload_timeout_s=runtime.offload_timeout_s,
    )


def ttls_of(config: Config, tiers: Iterable[Tier]) -> dict[Tier, float]:
    """Give the seconds after which unused blocks leave a tier, of those tiers that have a limit.

    Parameters
    ----------
    config : Config
    tiers : iterable of Tier
    """
    return {tier: ttl_s for tier in tiers if (ttl_s := config.tier(tier).ttl_s) is not None}


def make_eviction_policy(config: Config, tier: Tier) -> Any:
    """Make what chooses the blocks that leave a tier.

    Parameters
    ----------
    config : Config
    tier : Tier

    Returns
    -------
    EvictionPolicy
        One for one pool.

    Raises
    ------
    PluginError
        The plug-in cannot be loaded.
    """
    return load_plugin("eviction", config.tier(tier).eviction)()


def make_offload_policy(
    config: Config, tier: Tier, *, num_blocks: int, slot_nbytes: int, given: OffloadPolicy | None = None
) -> OffloadPolicy:
    """Make, or take, the policy of the route into a tier, within the tier's write budget.

    Parameters
    ----------
    config : Config
    tier : Tier
    num_blocks : int
        Of the tier.
    slot_nbytes : int
        Bytes that a block takes there.
    given : OffloadPolicy, optional
        Taken instead of what the configuration names.

    Raises
    ------
    ConfigError
        The plug-in gives something else.
    PluginError
        It cannot be loaded.
    """
    policy = given if given is not None else _load_offload_policy(config, tier, num_blocks)
    nbytes_per_day = getattr(config.tier(tier), "write_budget_nbytes", 0)
    return WriteBudget(policy, slot_nbytes, nbytes_per_day=nbytes_per_day) if nbytes_per_day else policy


def _load_offload_policy(config: Config, tier: Tier, num_blocks: int) -> OffloadPolicy:
    name = getattr(config.tier(tier), "offload_policy", None) or config.offload.policy
    settings: dict[str, Any] = {
        "second_use": {"max_blocks": config.offload.use_count_blocks},
        "priority": {"min_priority": config.offload.min_priority},
        "tinylfu": {"num_blocks": num_blocks},
    }.get(name, {})
    policy = load_plugin("offload", name)(**settings)
    if not isinstance(policy, OffloadPolicy):
        raise ConfigError(f"offload plug-in {name!r} gave a {type(policy).__name__}, must give an OffloadPolicy")
    return policy
