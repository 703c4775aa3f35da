"""An engine's KV tensors as memory: addresses and strides, whatever the dimensions mean. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbm.engines.shard import LayerMemory
from kvbm.errors import LayoutError

_ON_GPU = ("cuda",)  # ROCm's tensors say so too, and have no machine code here: opening the GPU says that


def memory_of(tensor: Any, name: str, num_blocks: int | None = None) -> LayerMemory:
    """Describe a layer's tensor by its strides.

    Parameters
    ----------
    tensor : torch.Tensor
        Blocks on the first axis, on the CPU or a GPU.
    name : str
        Of the layer, for messages.
    num_blocks : int, optional
        That the engine counts; its kernels may cut each into several. None: as many as the tensor has.

    Raises
    ------
    LayoutError
        It lies on another device, has no axis of blocks, or a block does not lie in one piece.
    """
    kind = tensor.device.type
    if kind != "cpu" and kind not in _ON_GPU:
        raise LayoutError(f"layer {name} lies on {tensor.device}: blocks can be on the CPU or on a CUDA device")
    itemsize, strides, shape = tensor.element_size(), tuple(tensor.stride()), tuple(tensor.shape)
    if len(shape) < 2:
        raise LayoutError(f"layer {name}: a tensor of shape {shape} has no axis of blocks, this kind cannot be cached")
    nbytes = itemsize
    for size, stride in sorted(zip(shape[1:], strides[1:], strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride * itemsize != nbytes:
            raise LayoutError(f"layer {name}: a block does not lie in one piece (shape {shape}, strides {strides})")
        nbytes *= size
    num_blocks, stride = num_blocks or shape[0], strides[0] * itemsize
    num_parts, rest = divmod(shape[0], num_blocks)
    if rest or not num_parts:
        raise LayoutError(f"layer {name} has {shape[0]} blocks, the engine counts {num_blocks}")
    if num_parts > 1 and stride != nbytes:
        raise LayoutError(f"layer {name}: {num_parts} parts of a block lie {stride} bytes apart, have {nbytes}")
    device = None if kind == "cpu" else tensor.device.index or 0
    return LayerMemory(tensor.data_ptr(), num_blocks, num_parts * stride, num_parts * nbytes, tensor, device)


def layers_of(
    names: Sequence[str], kv_caches: Mapping[str, Any], num_blocks: int | None = None
) -> tuple[list[LayerMemory], dict[str, int]]:
    """Describe the layers of a group; those that share a tensor are one.

    Parameters
    ----------
    names : sequence of str
        Of the group's layers, in the model's order; those without a tensor here are left out.
    kv_caches : mapping
        Tensors by name.
    num_blocks : int, optional
        As for `memory_of`.

    Returns
    -------
    layers : list of LayerMemory
    numbers : dict of str to int
        Which of them a name means.
    """
    layers: list[LayerMemory] = []
    by_address: dict[int, int] = {}
    numbers: dict[str, int] = {}
    for name in names:
        if name not in kv_caches:
            continue
        layer = memory_of(kv_caches[name], name, num_blocks)
        if layer.address not in by_address:
            by_address[layer.address] = len(layers)
            layers.append(layer)
        numbers[name] = by_address[layer.address]
    return layers, numbers
