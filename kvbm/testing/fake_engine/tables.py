"""The block tables of a fake engine's requests: room for their tokens, as vLLM's cache manager finds it."""

from __future__ import annotations

from kvbm.testing.fake_engine.blocks import BlockPool
from kvbm.testing.fake_engine.requests import NULL_BLOCK, FakeRequest
from kvbm.testing.fake_engine.shape import EngineShape


class Tables:
    """Gives blocks to requests and takes them back.

    Parameters
    ----------
    shape : EngineShape

    Attributes
    ----------
    pool : BlockPool
    """

    def __init__(self, shape: EngineShape) -> None:
        self._shape = shape
        self.pool = BlockPool(shape)

    def allocate(
        self,
        request: FakeRequest,
        num_new: int,
        local: list[list[int]] | None = None,
        num_computed: int | None = None,
        *,
        reserved: int | None = None,
    ) -> list[int] | None:
        """Find room for a request's next tokens.

        Parameters
        ----------
        request : FakeRequest
        num_new : int
            Tokens that are computed next.
        local : list of list of int, optional
            For each group the blocks of its prefix that the engine has found.
        num_computed : int, optional
            Tokens that it has, will have found and will have been loaded; None: those it has.
        reserved : int, optional
            The blocks are loaded while the engine goes on, and others that wait so will need this many: such a request
            holds its blocks and cannot be preempted, so all of it must fit. None where it is computed now.

        Returns
        -------
        list of int or None
            The blocks that it did not share; None where there is no room, and nothing was taken.
        """
        size, pool = self._shape.block_tokens, self.pool
        computed = request.num_computed_tokens if num_computed is None else num_computed
        self.leave_window(request, computed)
        num_blocks = -(-(computed + num_new) // size)
        hits: list[list[int]] = []
        num_fresh: list[int] = []
        for group, table in enumerate(request.tables):
            first = self._shape.first_in_window(group, computed) // size
            mine = [NULL_BLOCK if index < first else block for index, block in enumerate(local[group] if local else [])]
            hits.append(mine)
            num_fresh.append(max(0, num_blocks - max(first, len(table) + len(mine))))
        num_revived = len({block for mine in hits for block in mine if block != NULL_BLOCK and pool.is_free(block)})
        num_needed = sum(num_fresh)
        if reserved is not None:
            num_needed = max(num_needed, self.num_missing(request) - sum(len(mine) for mine in hits)) + reserved
        if num_needed + num_revived > pool.num_free:
            return None
        for mine in hits:
            pool.touch(mine)
        fresh: list[int] = []
        for table, mine, num in zip(request.tables, hits, num_fresh, strict=True):
            ids = pool.allocate(num)
            table.extend([*mine, *[NULL_BLOCK] * (num_blocks - len(table) - len(mine) - num), *ids])
            fresh += ids
        if reserved is None:
            self.cache(request, min(computed + num_new, request.num_tokens))
        return fresh

    def num_missing(self, request: FakeRequest) -> int:
        """Count the blocks that a request needs until its end, at most."""
        num_tokens = request.num_prompt_tokens + request.max_tokens
        return -(-num_tokens // self._shape.block_tokens) * self._shape.num_groups - sum(map(len, request.tables))

    def cache(self, request: FakeRequest, num_tokens: int) -> None:
        """Let the full blocks of a request's first tokens be found by others."""
        num_full = num_tokens // self._shape.block_tokens
        for group, table in enumerate(request.tables):
            self.pool.cache(group, request.block_hashes[:num_full], table[:num_full])

    def leave_window(self, request: FakeRequest, num_tokens: int) -> None:
        """Let go of the blocks that a window has left behind so many tokens."""
        for group, table in enumerate(request.tables):
            first = min(len(table), self._shape.first_in_window(group, num_tokens) // self._shape.block_tokens)
            self.pool.release(table[:first])
            table[:first] = [NULL_BLOCK] * first

    def cut(self, request: FakeRequest) -> list[list[int]]:
        """Give the blocks of the computed tokens, for each group."""
        num_blocks = -(-request.num_computed_tokens // self._shape.block_tokens)
        return [list(table[:num_blocks]) for table in request.tables]

    def release(self, request: FakeRequest) -> None:
        """Take all blocks of a request back."""
        for table in request.tables:
            self.pool.release(table)
            table.clear()
