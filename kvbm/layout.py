"""Layouts: where the bytes of a block lie, as strides on named axes.

Axes are block, layer, outer (K and V), token, head, and the head's elements, which are always contiguous. A region is
one layer's K or V of one block. Arithmetic only: a layout knows sizes and offsets; bound to base addresses it knows
addresses. Elements are opaque bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec
import numpy as np

from kvbm.errors import LayoutError

# Element types by name: bytes an element, and the NumPy type that shows them (unsigned where NumPy has none).
DTYPES: dict[str, tuple[int, str]] = {
    "float16": (2, "float16"),
    "float32": (4, "float32"),
    "float64": (8, "float64"),
    "bfloat16": (2, "uint16"),
    "float8_e4m3": (1, "uint8"),
    "float8_e4m3fn": (1, "uint8"),
    "float8_e5m2": (1, "uint8"),
    "int8": (1, "int8"),
    "int16": (2, "int16"),
    "int32": (4, "int32"),
    "uint8": (1, "uint8"),
    "uint16": (2, "uint16"),
    "uint32": (4, "uint32"),
    "uint64": (8, "uint64"),
}

_MAX_ALIGNMENT = 1 << 30


class Strides(msgspec.Struct, frozen=True):
    """Bytes from one index to the next on each axis; `layer` is 0 where each layer has a buffer of its own."""

    block: int
    layer: int
    outer: int
    token: int
    head: int


@dataclass(frozen=True)
class BlockLayout:
    """How num_blocks blocks lie in one buffer, or in one buffer a layer.

    Parameters
    ----------
    num_blocks, num_layers, outer_dim, block_size : int
        outer_dim is 2 for K and V, 1 for MLA; block_size is in tokens.
    inner_dim : int
        Elements of one token in one layer's K or V: num_heads * head size.
    dtype : str
        A name in `DTYPES`. Packed types such as INT4 are described by their bytes, as "uint8".
    strides : Strides
        In bytes.
    num_heads : int
    has_layer_buffers : bool
        Each layer has a buffer of its own.
    buffer_nbytes : int
        Size of each buffer.

    Raises
    ------
    LayoutError
        Impossible dimensions, or strides under which two elements share a byte or leave the buffer.

    Examples
    --------
    >>> layout = BlockLayout.fully_contiguous(
    ...     num_blocks=4, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16"
    ... )
    >>> layout.offset(1, 1, 0)
    (0, 1536)
    """

    num_blocks: int
    num_layers: int
    outer_dim: int
    block_size: int
    inner_dim: int
    dtype: str
    strides: Strides
    num_heads: int = 1
    has_layer_buffers: bool = False
    buffer_nbytes: int = 0

    def __post_init__(self) -> None:
        _check_dimensions(self)
        if self.buffer_nbytes == 0:
            object.__setattr__(self, "buffer_nbytes", self.extent_nbytes)
        _check_strides(self)

    # -- the three usual ones, and any other -------------------------------------------------------------------

    @classmethod
    def fully_contiguous(
        cls,
        *,
        num_blocks: int,
        num_layers: int,
        outer_dim: int,
        block_size: int,
        inner_dim: int,
        dtype: str,
        alignment: int = 1,
        num_heads: int = 1,
    ) -> BlockLayout:
        """Lay all layers of a block side by side, each block starting on a multiple of `alignment` bytes."""
        dims = _Dims(num_blocks, num_layers, outer_dim, block_size, inner_dim, dtype, num_heads)
        region = dims.region_nbytes
        block = _up(num_layers * outer_dim * region, alignment)
        strides = Strides(block, outer_dim * region, region, dims.token_nbytes, dims.head_nbytes)
        return cls(**dims.as_fields(), strides=strides, buffer_nbytes=num_blocks * block)

    @classmethod
    def layer_separate(
        cls,
        *,
        block_first: bool,
        num_blocks: int,
        num_layers: int,
        outer_dim: int,
        block_size: int,
        inner_dim: int,
        dtype: str,
        alignment: int = 1,
        num_heads: int = 1,
    ) -> BlockLayout:
        """Give each layer a buffer; in it K and V of a block lie together (block first), or all K before all V."""
        dims = _Dims(num_blocks, num_layers, outer_dim, block_size, inner_dim, dtype, num_heads)
        region = dims.region_nbytes
        block = _up(outer_dim * region if block_first else region, alignment)
        outer = region if block_first else block * num_blocks
        strides = Strides(block, 0, outer, dims.token_nbytes, dims.head_nbytes)
        nbytes = num_blocks * block * (1 if block_first else outer_dim)
        return cls(**dims.as_fields(), strides=strides, has_layer_buffers=True, buffer_nbytes=nbytes)

    @classmethod
    def custom(
        cls,
        *,
        num_blocks: int,
        num_layers: int,
        outer_dim: int,
        block_size: int,
        inner_dim: int,
        dtype: str,
        strides: dict[str, int],
        num_heads: int = 1,
        buffer_nbytes: int = 0,
    ) -> BlockLayout:
        """Describe an engine's tensor by its strides in bytes on block, layer, outer, token and head.

        Without ``"layer"`` each layer has a buffer of its own. ``"token"`` and ``"head"`` default to NHD order, dense.
        """
        dims = _Dims(num_blocks, num_layers, outer_dim, block_size, inner_dim, dtype, num_heads)
        unknown = set(strides) - {"block", "layer", "outer", "token", "head"}
        if unknown or not {"block", "outer"} <= set(strides):
            raise LayoutError(
                f"strides need block and outer, and may have layer, token and head, got {sorted(strides)}"
            )
        return cls(
            **dims.as_fields(),
            strides=Strides(
                strides["block"],
                strides.get("layer", 0),
                strides["outer"],
                strides.get("token", dims.token_nbytes),
                strides.get("head", dims.head_nbytes),
            ),
            has_layer_buffers="layer" not in strides,
            buffer_nbytes=buffer_nbytes,
        )

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPES[self.dtype][0]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type that NumPy shows elements as; unsigned integers where it has none of that name."""
        return np.dtype(DTYPES[self.dtype][1])

    @property
    def head_nbytes(self) -> int:
        """Bytes of one head of one token."""
        return self.inner_dim // self.num_heads * self.itemsize

    @property
    def region_nbytes(self) -> int:
        """Bytes of one layer's K or V of one block, gaps excluded."""
        return self.block_size * self.inner_dim * self.itemsize

    @property
    def block_nbytes(self) -> int:
        """Bytes that one block holds, gaps excluded."""
        return self.num_layers * self.outer_dim * self.region_nbytes

    @property
    def num_buffers(self) -> int:
        """Buffers that the layout needs: 1, or one a layer."""
        return self.num_layers if self.has_layer_buffers else 1

    @property
    def extent_nbytes(self) -> int:
        """Bytes from the first to the end of the last element of a buffer."""
        return sum((size - 1) * stride for _, size, stride in _axes(self)) + self.head_nbytes

    @property
    def region_order(self) -> tuple[str, ...]:
        """Axes of a region that have more than one index, outermost first: ("token", "head") is NHD."""
        sizes = {"token": (self.block_size, self.strides.token), "head": (self.num_heads, self.strides.head)}
        present = [(stride, axis) for axis, (size, stride) in sizes.items() if size > 1]
        return tuple(axis for _, axis in sorted(present, reverse=True))

    def dense(self, num_blocks: int, *, alignment: int = 1) -> BlockLayout:
        """Lay the same blocks side by side without gaps inside a block, tokens and heads in this layout's order."""
        head, token, region = self.head_nbytes, self.inner_dim * self.itemsize, self.region_nbytes
        is_head_major = self.region_order == ("head", "token")
        block = _up(self.block_nbytes, alignment)
        return replace(
            self,
            num_blocks=num_blocks,
            strides=Strides(
                block=block,
                layer=self.outer_dim * region,
                outer=region,
                token=head if is_head_major else token,
                head=head * self.block_size if is_head_major else head,
            ),
            has_layer_buffers=False,
            buffer_nbytes=num_blocks * block,
        )

    @property
    def is_dense(self) -> bool:
        """Whether a block is one run of bytes in logical order, so that it can be read and written as it lies."""
        dense = self.dense(self.num_blocks).strides
        return not self.has_layer_buffers and self.strides == msgspec.structs.replace(dense, block=self.strides.block)

    # -- places ------------------------------------------------------------------------------------------------

    def offset(self, block: int, layer: int, outer: int) -> tuple[int, int]:
        """Give the buffer in which a region lies, and its first byte there."""
        for axis, index, bound in (
            ("block", block, self.num_blocks),
            ("layer", layer, self.num_layers),
            ("outer", outer, self.outer_dim),
        ):
            if not 0 <= index < bound:
                raise LayoutError(f"{axis} {index} is outside 0..{bound - 1}")
        start = block * self.strides.block + layer * self.strides.layer + outer * self.strides.outer
        return (layer if self.has_layer_buffers else 0), start

    def bind(self, addresses: Sequence[int], nbytes: Sequence[int] | None = None) -> BoundLayout:
        """Give each buffer its address, and check sizes where they are told."""
        if len(addresses) != self.num_buffers:
            raise LayoutError(f"the layout has {self.num_buffers} buffers, got {len(addresses)}")
        for i, size in enumerate(nbytes or ()):
            if size < self.buffer_nbytes:
                raise LayoutError(f"buffer {i} has {size} bytes, the layout needs {self.buffer_nbytes}")
        return BoundLayout(self, tuple(int(address) for address in addresses))

    # -- serialisation -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Describe the layout in plain values."""
        return {**asdict(self), "strides": msgspec.to_builtins(self.strides)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> BlockLayout:
        """Make a layout from what `to_dict` gave."""
        try:
            return cls(**{**fields, "strides": msgspec.convert(fields["strides"], Strides)})
        except (TypeError, KeyError, msgspec.ValidationError) as error:
            raise LayoutError(f"this is no description of a layout: {error}") from error


@dataclass(frozen=True)
class BoundLayout:
    """A layout whose buffers have addresses."""

    layout: BlockLayout
    addresses: tuple[int, ...]

    def address(self, block: int, layer: int, outer: int) -> int:
        """Give the address of a region."""
        buffer, offset = self.layout.offset(block, layer, outer)
        return self.addresses[buffer] + offset

    def to_json(self) -> bytes:
        """Describe layout and addresses, e.g. for another process that maps the same memory."""
        return msgspec.json.encode({"layout": self.layout.to_dict(), "addresses": self.addresses})

    @classmethod
    def from_json(cls, data: bytes) -> BoundLayout:
        """Make a bound layout from what `to_json` gave."""
        try:
            fields = msgspec.json.decode(data, type=dict[str, Any])
            addresses = msgspec.convert(fields["addresses"], list[int])
            layout = BlockLayout.from_dict(msgspec.convert(fields["layout"], dict[str, Any]))
        except (msgspec.MsgspecError, KeyError) as error:
            raise LayoutError(f"this is no description of a bound layout: {error}") from error
        return layout.bind(addresses)


@dataclass(frozen=True)
class _Dims:
    """The dimensions that every constructor takes, checked before anything is computed from them."""

    num_blocks: int
    num_layers: int
    outer_dim: int
    block_size: int
    inner_dim: int
    dtype: str
    num_heads: int

    def __post_init__(self) -> None:
        _check_dimensions(self)

    @property
    def token_nbytes(self) -> int:
        return self.inner_dim * DTYPES[self.dtype][0]

    @property
    def head_nbytes(self) -> int:
        return self.token_nbytes // self.num_heads

    @property
    def region_nbytes(self) -> int:
        return self.block_size * self.token_nbytes

    def as_fields(self) -> dict[str, Any]:
        return asdict(self)


def _check_dimensions(dims: Any) -> None:
    if dims.dtype not in DTYPES:
        raise LayoutError(f"dtype {dims.dtype!r} is not known, use one of {', '.join(DTYPES)}")
    for axis in ("num_blocks", "num_layers", "outer_dim", "block_size", "inner_dim", "num_heads"):
        value = getattr(dims, axis)
        if isinstance(value, bool) or not isinstance(value, int):
            raise LayoutError(f"{axis} must be an integer, got {value!r}")
        if value < 1:
            raise LayoutError(f"{axis} {value} is impossible, give 1 or more")
    if dims.inner_dim % dims.num_heads:
        raise LayoutError(f"inner_dim {dims.inner_dim} is no multiple of num_heads {dims.num_heads}")


def _check_strides(layout: BlockLayout) -> None:
    """No two elements share a byte, and none lies outside the buffer."""
    covered, inner = layout.head_nbytes, "head elements"
    for axis, _, stride in sorted(_axes(layout), key=lambda entry: entry[2]):
        if stride < covered:
            raise LayoutError(f"{axis} stride {stride} is less than the {covered} bytes of {inner}: they would overlap")
        covered, inner = stride * (_size_of(layout, axis) - 1) + covered, axis
    if layout.extent_nbytes > layout.buffer_nbytes:
        raise LayoutError(f"buffer_nbytes {layout.buffer_nbytes} is less than the {layout.extent_nbytes} that are used")


def _size_of(layout: BlockLayout, axis: str) -> int:
    return next(size for name, size, _ in _axes(layout) if name == axis)


def _axes(layout: BlockLayout) -> list[tuple[str, int, int]]:
    """Axes inside one buffer that have more than one index: name, size, stride."""
    strides = layout.strides
    axes = [
        ("block", layout.num_blocks, strides.block),
        ("layer", 1 if layout.has_layer_buffers else layout.num_layers, strides.layer),
        ("outer", layout.outer_dim, strides.outer),
        ("token", layout.block_size, strides.token),
        ("head", layout.num_heads, strides.head),
    ]
    return [axis for axis in axes if axis[1] > 1]


def _up(nbytes: int, alignment: int) -> int:
    if not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise LayoutError(f"alignment {alignment} is no power of two in 1..{_MAX_ALIGNMENT}")
    return (nbytes + alignment - 1) & ~(alignment - 1)
