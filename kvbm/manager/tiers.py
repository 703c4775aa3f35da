"""What a manager says about its tiers: their pools and bytes, keeping, staging, forgetting, what loading is worth."""

from __future__ import annotations

from kvbm.assembly import Assembly
from kvbm.config import Config
from kvbm.errors import ConfigError
from kvbm.layout import BlockLayout
from kvbm.planner import Advice, Hit, Planner, PlannerThread, Prefetch, RouteEstimate
from kvbm.pool import BlockPool
from kvbm.storage.base import Storage
from kvbm.types import HashArray, ResetBlocksResponse, Tier


class TierVerbs:
    """The part of `BlockManager` that is about tiers."""

    config: Config
    layout: BlockLayout
    page_size: int
    _parts: Assembly
    _planner: Planner
    _pools: dict[Tier, BlockPool]  # from the top tier down
    _storages: dict[Tier, Storage]
    _top: BlockPool

    @property
    def device(self) -> BlockPool:
        """The device tier's pool (G1); raises `ConfigError` where there is none."""
        return self._pools[self._tier(Tier.DEVICE)]

    @property
    def host(self) -> BlockPool | None:
        """The host tier's pool (G2), None without."""
        return self._pools.get(Tier.HOST)

    @property
    def disk(self) -> BlockPool | None:
        """The disk tier's pool (G3), None without."""
        return self._pools.get(Tier.DISK)

    @property
    def remote(self) -> BlockPool | None:
        """The object store tier's pool (G4), None without: what is known to be there, not how much it holds."""
        return self._pools.get(Tier.REMOTE)

    @property
    def top(self) -> BlockPool:
        """The highest tier's pool, where blocks are filled and used: the device tier's where there is one."""
        return self._top

    def storage(self, tier: Tier | str) -> Storage:
        """Give the bytes of a tier; host memory stands in for a GPU where there is none."""
        return self._storages[self._tier(tier)]

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything registered before is as far down as it goes, or was dropped and counted.

        Raises
        ------
        TransferTimeout
            It takes longer than `timeout` seconds; the work goes on.
        TransferError
            Called in a callback of a transfer.
        PoolClosed
            The manager is closed, or was closed meanwhile.
        """
        self._planner.flush(timeout)
        if self._thread is not None:
            self._thread.check()

    def reset_pool(self, tier: Tier | str) -> int:
        """Forget every block of one tier, offloads in flight waited for; return how many.

        Raises
        ------
        BlockStateError
            Some block is in use, or pinned (`unpin` it first); nothing was forgotten.
        TransferTimeout
            Offloads of the tier move for longer than ``runtime.offload_timeout_s``; nothing was forgotten.
        """
        return self._planner.reset_pool(self._pools[self._tier(tier)], self.config.runtime.offload_timeout_s)

    def reset_blocks(self, tier: Tier | str, hashes: HashArray) -> ResetBlocksResponse:
        """Forget blocks of one tier by hash, those on their way down to it too; those in use stay."""
        return self._planner.reset_blocks(self._pools[self._tier(tier)], hashes)

    def reset_all(self) -> int:
        """Forget every block of every tier, from the top down; return how many.

        Raises
        ------
        BlockStateError
            Some block is in use; the tiers above it are reset already.
        """
        return sum(self.reset_pool(tier) for tier in self._pools)

    # -- keeping and staging -----------------------------------------------------------------------------------

    def pin(self, hashes: HashArray, ttl: float) -> int:
        """Keep blocks where they are for some time, whatever else needs the room.

        Each block is held by one reference in the highest tier that has it. A block that is pinned already is pinned
        until the later of the two moments.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64, host
            Of one or of several sequences.
        ttl : float
            Seconds from now, more than 0.

        Returns
        -------
        int
            Blocks that are pinned for that long now. What is in no tier is not, nor what would go beyond
            ``offload.pin_share`` of its tier; the first ones are taken first.

        Raises
        ------
        ConfigError
            `ttl` is no time.
        PoolClosed
            The manager is closed.

        Notes
        -----
        A pinned block can be matched and onboarded as ever. `reset_pool` and `reset_all` refuse while blocks of the
        tier are pinned, `reset_blocks` answers that they are in use. Pins end with the manager.
        """
        num_pinned = self._planner.pins.pin(hashes, ttl)
        if num_pinned:
            self._parts.need_thread()
        return num_pinned

    def unpin(self, hashes: HashArray | None = None) -> int:
        """Let go of pinned blocks, all of them where no hashes are given; return how many were pinned."""
        return self._planner.pins.unpin(hashes)

    def num_pinned(self, tier: Tier | str) -> int:
        """Count the pinned blocks of a tier."""
        return self._planner.pins.num_pinned(self._pools[self._tier(tier)])

    @property
    def away_tiers(self) -> dict[str, bool]:
        """Whether each tier that others share could not be reached a short while ago, by the tier's name."""
        return {presence.tier.value: presence.is_away for presence in self._planner.presences}

    def prefetch(self, hashes: HashArray, *, timeout: float | None = None) -> Prefetch:
        """Bring blocks from lower tiers into the host tier in the background, for a request that is expected.

        Without a host tier they come to the top tier.

        Parameters
        ----------
        hashes : (num_blocks, 2) uint64, host
            Of one or of several sequences; each block is looked at by itself.
        timeout : float, optional
            Seconds; default ``runtime.offload_timeout_s`` of the configuration.

        Returns
        -------
        Prefetch
            Says at once how many blocks are `accepted`, `clipped` and `rejected`; its result is the number of blocks
            that arrived. It never makes a request wait: an onboarding goes first, and joins what moves already. Blocks
            that only an object store may have are `asked` for: once it has answered, by the deadline at the latest,
            they count as one of the others, and what it has comes too.

        Raises
        ------
        PoolClosed
            The manager is closed.
        """
        return self._planner.prefetch(hashes, timeout)

    def plan_onboard(self, hit: Hit, prefill_tokens_per_s: float) -> Advice:
        """Tell how many leading blocks of a hit are worth loading, and how many are computed sooner than loaded.

        Parameters
        ----------
        hit : Hit
            Stays as it is: `Hit.truncate` lets go of what is not worth loading.
        prefill_tokens_per_s : float
            Tokens that the engine computes in a second, for one request.

        Returns
        -------
        Advice
            With predicted times and the reason; ``str(advice)`` is a line for a log.

        Raises
        ------
        ConfigError
            The rate is no number above 0.
        BlockStateError
            The hit is used up.
        PoolClosed
            The manager is closed.

        Notes
        -----
        Predictions come from the jobs of the same route so far, recent ones first; before the first one from a stated
        default. A tier that is not worth loading from is measured again now and then, by a small prefetch that no
        request waits for.
        """
        return self._planner.advisor.advise(
            hit, prefill_tokens_per_s, block_tokens=self.page_size, block_nbytes=self.layout.block_nbytes
        )

    def route_estimates(self) -> dict[tuple[Tier, Tier], RouteEstimate]:
        """Give what was measured of each route so far; what comes up from a tier stands under it and the top one."""
        return self._planner.estimates.routes()

    # -- private -----------------------------------------------------------------------------------------------

    @property
    def _thread(self) -> PlannerThread | None:
        return self._parts.thread

    def _tier(self, tier: Tier | str) -> Tier:
        if tier not in self._pools:
            known = ", ".join(repr(known.value) for known in self._pools)
            raise ConfigError(f"there is no tier {getattr(tier, 'value', tier)!r} here, use {known}")
        return Tier(tier)
