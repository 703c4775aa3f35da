"""The memory of one rank of a fake engine, and beside it what must be in each word of it.

Every token's words derive from all tokens up to it, its layer, group and rank, and from the epoch of the weights. What
the engine writes is noted, so a byte that anybody else changes is seen at the end of the step, wherever it lies; what a
connector is to load is unknown until it says that it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm.testing.fake_engine.requests import NULL_BLOCK, FakeRequest, Pass, Words
from kvbm.testing.fake_engine.shape import EngineShape

POISON, PADDING, GARBAGE = 0xEEEE, 0xDDDD, 0x0BAD

Ids = npt.NDArray[np.intp]


class FakeTensor:
    """A layer's memory, with what connectors ask of a torch tensor: a view of a numpy array, on the CPU.

    Parameters
    ----------
    array : numpy array
        (num_blocks, num_heads, block_tokens, head_words) uint16, host; blocks may lie apart.
    """

    def __init__(self, array: npt.NDArray[np.uint16]) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = "float16"
        self.device = SimpleNamespace(type="cpu", index=None)
        self.is_cuda = False

    def __getitem__(self, key: Any) -> FakeTensor:
        return FakeTensor(self._array[key])

    def numpy(self) -> npt.NDArray[np.uint16]:
        """Give the array itself."""
        return self._array

    def data_ptr(self) -> int:
        """Give the address of the first element."""
        return int(self._array.ctypes.data)

    def element_size(self) -> int:
        """Give the bytes of an element."""
        return int(self._array.itemsize)

    def stride(self, axis: int | None = None) -> Any:
        """Give the elements from one index to the next, of all axes or of one."""
        strides = tuple(stride // self._array.itemsize for stride in self._array.strides)
        return strides if axis is None else strides[axis]

    def storage_offset(self) -> int:
        """Give 0: each layer has memory of its own."""
        return 0

    def numel(self) -> int:
        """Give the number of elements."""
        return int(self._array.size)

    def dim(self) -> int:
        """Give the number of axes."""
        return self._array.ndim

    def is_contiguous(self) -> bool:
        """Whether blocks lie one behind the other."""
        return bool(self._array.flags.c_contiguous)


class RankMemory:
    """One rank's blocks.

    Parameters
    ----------
    shape : EngineShape
    rank : int

    Attributes
    ----------
    epoch : int
        Of the weights: other weights give other words for the same tokens.
    """

    def __init__(self, shape: EngineShape, rank: int) -> None:
        self._shape = shape
        self._rank = 0 if shape.has_mla else rank
        self.epoch = 0
        num_words = shape.num_heads * shape.block_tokens * shape.head_words
        self._all = np.full((shape.num_layers, shape.num_blocks, num_words + shape.padding_words), PADDING, np.uint16)
        step = self._all.itemsize
        heads, tokens, words = shape.num_heads, shape.block_tokens, shape.head_words
        self._blocks = np.ndarray(  # (layer, block, head, token, word): vLLM's order on the CPU
            (shape.num_layers, shape.num_blocks, heads, tokens, words),
            dtype=np.uint16,
            buffer=self._all,
            strides=(self._all.strides[0], self._all.strides[1], tokens * words * step, words * step, step),
        )
        self._blocks[:] = POISON
        self._words = self._blocks.swapaxes(2, 3)  # (layer, block, token, head, word)
        self._padding = self._all[:, :, num_words:]
        self._expected = self._words.copy()
        self._is_known = np.ones((shape.num_blocks, shape.block_tokens), dtype=np.bool_)
        self._keys: dict[tuple[int, int], Words] = {}

    def tensors(self) -> dict[str, FakeTensor]:
        """Give each layer's tensor by its name; layers of several groups lie in the same memory."""
        shape = self._shape
        return {
            shape.layer_name(group, layer): FakeTensor(self._blocks[layer])
            for group in range(shape.num_groups)
            for layer in range(shape.num_layers)
        }

    # -- what must be where ------------------------------------------------------------------------------------

    def content(self, request: FakeRequest, group: int) -> npt.NDArray[np.uint16]:
        """Give the words of all tokens of a request: (num_layers, num_tokens, num_heads, head_words) uint16."""
        key = self._rank, group, self.epoch
        known = request.contents.get(key)
        num_known = 0 if known is None else known.shape[1]
        if known is None or num_known < request.num_tokens:
            chain = np.array(request.chain[num_known:], dtype=np.uint64)[None, :, None, None]
            mixed = (chain ^ self._keys_of(group)) * np.uint64(0xD6E8FEB86659FD93)
            new = ((mixed ^ (mixed >> np.uint64(32))) >> np.uint64(8)).astype(np.uint16)
            known = request.contents[key] = new if known is None else np.concatenate([known, new], axis=1)
        return known

    def _keys_of(self, group: int) -> Words:
        """Give a number for each word of a token: (num_layers, 1, num_heads, head_words) uint64."""
        key = group, self.epoch
        if key not in self._keys:
            shape = self._shape
            axes = shape.num_layers, 1, shape.num_heads, shape.head_words
            name = f"{group} {self._rank} {self.epoch}".encode()
            data = hashlib.shake_128(name).digest(8 * int(np.prod(axes)))
            self._keys[key] = np.frombuffer(data, dtype=np.uint64).reshape(axes)
        return self._keys[key]

    # -- what the engine does ----------------------------------------------------------------------------------

    def poison(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks, as others do that got them."""
        if block_ids:
            ids = np.array(block_ids, dtype=np.intp)
            self._words[:, ids] = self._expected[:, ids] = POISON
            self._is_known[ids] = True

    def open(self, block_ids: Sequence[int]) -> None:
        """Let anything be in blocks: they are being loaded."""
        if block_ids:
            self._is_known[np.array(block_ids, dtype=np.intp)] = False

    def write(self, one: Pass, group: int, layer: int, *, is_misled: bool) -> None:
        """Compute a pass's tokens in one layer; what is computed from wrong words is wrong."""
        ids, places = self._cells(one.tokens, one.tables[group])
        words = self.content(one.request, group)[layer, one.tokens.start : one.tokens.stop]
        words = words ^ np.uint16(GARBAGE) if is_misled else words
        self._words[layer, ids, places] = self._expected[layer, ids, places] = words
        self._is_known[ids, places] = True

    def take(self, request: FakeRequest, group: int, tokens: Sequence[int], table: Sequence[int]) -> None:
        """Note that tokens were loaded: from now on they must be as they should."""
        ids, places = self._cells(tokens, table)
        words = self.content(request, group)[:, np.array(tokens, dtype=np.intp)]
        self._expected[:, ids, places] = words
        self._is_known[ids, places] = True

    def wrong(
        self, request: FakeRequest, group: int, tokens: Sequence[int], table: Sequence[int], *, layer: int | None = None
    ) -> set[int]:
        """Give the blocks of some tokens that do not hold what they should, of one layer or of all."""
        ids, places = self._cells(tokens, table)
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        words = self.content(request, group)[layers, np.array(tokens, dtype=np.intp)]
        is_wrong = (self._words[layers, ids, places] != words).any(axis=(0, 2, 3))
        return set(ids[is_wrong].tolist())

    def touched(self) -> set[int]:
        """Give the blocks that somebody else has written to, the space behind them included."""
        is_other = (self._words != self._expected).any(axis=(0, 3, 4)) & self._is_known
        is_other[:, 0] |= (self._padding != PADDING).any(axis=(0, 2))
        return set(is_other.any(axis=1).nonzero()[0].tolist())

    def _cells(self, tokens: Sequence[int], table: Sequence[int]) -> tuple[Ids, Ids]:
        """Give block and place of each token: (num_tokens,) each."""
        places = np.array(tokens, dtype=np.intp)
        ids = np.array(table, dtype=np.intp)[places // self._shape.block_tokens] if len(places) else places
        assert NULL_BLOCK not in ids, "the engine reads and writes its own blocks only"
        return ids, places % self._shape.block_tokens
