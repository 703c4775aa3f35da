"""What every allocator must keep: a writable buffer of the size asked for, of its own, for as long as it is held."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvbm.layout import BlockLayout
from kvbm.storage.host import HostStorage


class AllocatorTests:
    """Inherit, override `make_buffer`, and let pytest collect the class.

    Examples
    --------
    >>> class TestBytearray(AllocatorTests):
    ...     def make_buffer(self, nbytes):
    ...         return bytearray(nbytes)
    >>> TestBytearray().test_buffers_share_no_byte()
    """

    def make_buffer(self, nbytes: int) -> Any:
        """Call the allocator: give a buffer of at least so many bytes."""
        raise TypeError(f"{type(self).__name__} must override make_buffer")

    @pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 1 << 20])
    def test_buffer_is_large_enough_contiguous_and_writable(self, nbytes: int) -> None:
        """Every byte asked for can be written and read back."""
        data = self._bytes_of(nbytes)
        assert len(data) >= nbytes, f"asked for {nbytes} bytes, got {len(data)}"
        pattern = np.arange(nbytes, dtype=np.uint64).astype(np.uint8)
        data[:nbytes] = pattern
        assert np.array_equal(data[:nbytes], pattern)

    def test_buffers_share_no_byte(self) -> None:
        """Two buffers that are held at once are two memories."""
        first, second = self._bytes_of(8192), self._bytes_of(8192)
        first[:] = 1
        second[:] = 2
        assert (first == 1).all()

    def test_buffer_lives_as_long_as_an_array_of_it(self) -> None:
        """Nothing else keeps the buffer: its memory must not be given out again while an array refers to it."""
        arrays = [self._bytes_of(65536) for _ in range(8)]
        for value, array in enumerate(arrays):
            array[:] = value
        assert [int(array.max()) for array in arrays] == [int(array.min()) for array in arrays] == list(range(8))

    @pytest.mark.parametrize("is_block_first", [None, True, False])
    def test_storage_keeps_blocks_in_it(self, is_block_first: bool | None) -> None:
        """A host tier over such buffers gives back what was written, in every layout."""
        shape: dict[str, Any] = {"num_blocks": 4, "num_layers": 3, "outer_dim": 2, "block_size": 4, "inner_dim": 8}
        if is_block_first is None:
            layout = BlockLayout.fully_contiguous(**shape, dtype="uint8")
        else:
            layout = BlockLayout.layer_separate(**shape, dtype="uint8", block_first=is_block_first)
        buffers = [self.make_buffer(layout.buffer_nbytes) for _ in range(layout.num_buffers)]
        with HostStorage(layout, buffers=buffers) as storage:
            data = np.random.default_rng(0).integers(0, 256, (4, layout.block_nbytes)).astype(np.uint8)
            ids = np.array([2, 0, 3, 1], dtype=np.int32)
            storage.write(ids, data)
            assert np.array_equal(storage.read(ids), data)

    def _bytes_of(self, nbytes: int) -> npt.NDArray[np.uint8]:
        view = memoryview(self.make_buffer(nbytes))
        assert view.contiguous, "the buffer is not contiguous"
        assert not view.readonly, "the buffer is read-only"
        return np.frombuffer(view.cast("B"), dtype=np.uint8)
