"""Users' objects, kept with blocks.

A value lies in a box of its own. Whoever finds later that a block was freed empties the box that lay there before,
never the one that the slot's next owner may have put there by now; so this needs no lock, and a user's finaliser that
runs here may call the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.types import BlockState, IdArray

Box = list[Any]


class BlockMetadata:
    """One object for each block that has one, by slot."""

    def __init__(self) -> None:
        self._boxes: dict[int, Box] = {}

    def __bool__(self) -> bool:
        return bool(self._boxes)

    def get(self, block_id: int) -> Any:
        """Give the object of a block, None without."""
        try:
            return self._boxes[block_id][0]
        except (KeyError, IndexError):
            return None

    def set(self, block_id: int, value: Any) -> None:
        """Keep an object with a block."""
        self._boxes[block_id] = [value]

    def forget(self, ids: IdArray) -> None:
        """Drop the objects of blocks that the caller owns: (num_blocks,) int32."""
        if self._boxes:
            for block_id in ids.tolist():
                self._boxes.pop(block_id, None)

    def sweep(self, states_of: Callable[[IdArray], npt.NDArray[np.uint8]]) -> None:
        """Drop the objects of blocks that are free, as this tells by slot."""
        boxes = self._boxes.copy()
        if boxes:
            states = states_of(np.array(list(boxes), dtype=np.int32))
            self.empty(box for box, state in zip(boxes.values(), states, strict=True) if state == BlockState.FREE)

    def boxes(self) -> dict[int, Box]:
        """Give the boxes by slot as they are now."""
        return self._boxes.copy()

    def empty(self, boxes: Iterable[Box | None]) -> None:
        """Drop what boxes held when the caller took them; None is passed over."""
        for box in boxes:
            if box is not None:
                box.clear()
