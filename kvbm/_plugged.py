"""Adapter between a store, of either twin, and an eviction policy written by somebody else.

Checks every answer of ``pop`` before the store believes it. An exception in ``pop`` is raised at once, as
`PluginError`, because nothing has changed yet. One in a notification is kept and raised by the next allocation that
must evict: the call that it came from has taken or given back references, and its caller must get its answer. Called
under the store's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from kvbm.errors import PluginError, bad_victims
from kvbm.types import HashArray, IdArray

_CALLS = ("inserted", "removed", "touched", "prioritised", "pop")


class PluggedPolicy:
    """Gives a Python policy the calls that a store makes.

    Parameters
    ----------
    policy : EvictionPolicy
    num_blocks : int
        Size of the store.
    hashes_of : callable
        Gives the hashes of blocks: ids to (n, 2) uint64.
    priority_of, is_inactive : callable
        Tell of one block.

    Raises
    ------
    PluginError
        The policy lacks one of the calls.
    """

    def __init__(
        self,
        policy: Any,
        num_blocks: int,
        *,
        hashes_of: Callable[[Sequence[int]], HashArray],
        priority_of: Callable[[int], int],
        is_inactive: Callable[[int], bool],
    ) -> None:
        self._policy = policy
        self._num_blocks = num_blocks
        self._hashes_of = hashes_of
        self._priority_of = priority_of
        self._is_inactive = is_inactive
        self._name = type(policy).__name__
        missing = [call for call in _CALLS if not callable(getattr(policy, call, None))]
        if missing:
            raise PluginError(
                f"eviction policy {self._name} has no {', '.join(missing)}: inherit kvbm.eviction.EvictionPolicy"
            )
        self._failure: PluginError | None = None  # of the first notification that failed

    def inserted(self, ids: Sequence[int], priorities: Sequence[int]) -> None:
        """Tell the policy of blocks that became inactive, oldest first."""
        if ids:
            self._tell("inserted", _ids(ids), self._hashes_of(ids), np.array(priorities, dtype=np.uint8))

    def removed(self, ids: Sequence[int]) -> None:
        """Tell the policy of blocks that are inactive no more, other than by its own choice."""
        if ids:
            self._tell("removed", _ids(ids))

    def touched(self, ids: Sequence[int]) -> None:
        """Tell the policy of blocks that were used again, oldest first."""
        if ids:
            self._tell("touched", _ids(ids))

    def prioritised(self, ids: Sequence[int], priorities: Sequence[int]) -> None:
        """Tell the policy of new priorities."""
        if ids:
            self._tell("prioritised", _ids(ids), np.array(priorities, dtype=np.uint8))

    def pop(self, n: int) -> list[int]:
        """Ask the policy for n victims and check them; a bad answer is put back and raises `PluginError`."""
        if n == 0:
            return []
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        answer = self._call("pop", n, frozenset[int](), give=list)
        victims: dict[int, None] = {}
        reason = None
        for value in answer:
            problem = self._problem_with(value, victims)
            if problem is None:
                victims[int(value)] = None
            reason = reason or problem
        if reason is None and len(victims) != n:
            reason = f"returned {len(victims)} of {n} blocks"
        if reason is not None:
            self.inserted(list(victims), [self._priority_of(block_id) for block_id in victims])
            raise bad_victims(self._name, reason)
        return list(victims)

    def _problem_with(self, value: Any, victims: Container[int]) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            return f"returned {value!r}, which is not a block id"
        if not 0 <= value < self._num_blocks:
            return f"returned block {value}, which is outside the pool"
        if int(value) in victims:
            return f"returned block {value} twice"
        if not self._is_inactive(int(value)):
            return f"returned block {value}, which is not inactive"
        return None

    def _tell(self, name: str, *arguments: Any) -> None:
        try:
            self._call(name, *arguments)
        except PluginError as error:
            self._failure = self._failure or error

    def _call(self, name: str, *arguments: Any, give: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """Call the policy and take its answer in by `give`, which may run more of the policy's code."""
        try:
            return give(getattr(self._policy, name)(*arguments))
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"eviction policy {self._name} failed in {name}: {error!r}") from error


def _ids(ids: Sequence[int]) -> IdArray:
    return np.array(ids, dtype=np.int32)
