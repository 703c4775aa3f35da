"""What every layout must keep: offsets by its strides, no two regions sharing a byte, refusals that name the axis."""

from __future__ import annotations

import numpy as np
import pytest

from kvbm.errors import LayoutError
from kvbm.layout import BlockLayout, BoundLayout


class LayoutTests:
    """Inherit, override `make_layout`, and let pytest collect the class."""

    def make_layout(self) -> BlockLayout:
        """Give a small layout; a few blocks, layers and tokens are enough."""
        raise TypeError(f"{type(self).__name__} must override make_layout")

    def test_regions_lie_inside_and_share_no_byte(self) -> None:
        """Every element of every region has bytes of its own."""
        layout = self.make_layout()
        used = [np.zeros(layout.buffer_nbytes, dtype=np.int32) for _ in range(layout.num_buffers)]
        heads, tokens = layout.num_heads, layout.block_size
        for block in range(layout.num_blocks):
            for layer in range(layout.num_layers):
                for outer in range(layout.outer_dim):
                    buffer, start = layout.offset(block, layer, outer)
                    for token, head in np.ndindex(tokens, heads):
                        at = start + token * layout.strides.token + head * layout.strides.head
                        assert at + layout.head_nbytes <= layout.buffer_nbytes
                        used[buffer][at : at + layout.head_nbytes] += 1
        assert max(int(buffer.max()) for buffer in used) == 1
        assert sum(int(buffer.sum()) for buffer in used) == layout.num_blocks * layout.block_nbytes

    @pytest.mark.parametrize(("axis", "place"), [("block", 0), ("layer", 1), ("outer", 2)])
    def test_index_outside_an_axis_is_refused(self, axis: str, place: int) -> None:
        """The error names the axis, the value and the bound."""
        layout = self.make_layout()
        bound = (layout.num_blocks, layout.num_layers, layout.outer_dim)[place]
        for value in (-1, bound):
            index = [0, 0, 0]
            index[place] = value
            with pytest.raises(LayoutError, match=rf"{axis} {value} is outside 0\.\.{bound - 1}"):
                layout.offset(*index)

    def test_description_survives_serialisation(self) -> None:
        """The copy is equal, addresses included."""
        layout = self.make_layout()
        bound = layout.bind([4096 * (i + 1) for i in range(layout.num_buffers)])
        again = BoundLayout.from_json(bound.to_json())
        assert again == bound
        assert again.address(layout.num_blocks - 1, layout.num_layers - 1, 0) == bound.address(
            layout.num_blocks - 1, layout.num_layers - 1, 0
        )

    def test_wrong_buffers_are_refused(self) -> None:
        """Number and size of the buffers are checked."""
        layout = self.make_layout()
        with pytest.raises(LayoutError, match=f"the layout has {layout.num_buffers} buffers"):
            layout.bind([1] * (layout.num_buffers + 1))
        with pytest.raises(LayoutError, match=f"the layout needs {layout.buffer_nbytes}"):
            layout.bind([1] * layout.num_buffers, [layout.buffer_nbytes - 1] * layout.num_buffers)
