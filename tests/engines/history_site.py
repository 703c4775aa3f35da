"""What the tests of a history share: prompts and names, and what is told of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from core_site import BLOCK_TOKENS, CoreSite

from kvbm.engines.explanation import Answer, Explanation, explain
from kvbm.engines.history import History
from kvbm.types import HashArray

MakeSite = Callable[..., CoreSite]
MakeHistory = Callable[..., History]


def tokens_of(seed: int, num_blocks: int) -> list[int]:
    return [seed * 1000 + i for i in range(num_blocks * BLOCK_TOKENS + 1)]


def names_of(seed: int, num_blocks: int) -> HashArray:
    return np.random.default_rng(seed).integers(1, 2**63, (num_blocks, 2)).astype(np.uint64)


def none(num_blocks: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    return np.full(num_blocks, -1, dtype=np.int8)


def told_of(history: History, request_id: str) -> Explanation:
    records = history.records()
    (record,) = [one for one in records if one.request_id == request_id]
    return explain(record, history, records)


def reasons_of(answer: Answer) -> dict[str, str]:
    """Give for each tier why it did not have the first block that was missed."""
    (miss,) = answer.misses
    return {reason.tier: reason.why for reason in miss.reasons}
