"""Executes copy plans: `TransferEngine` between memories of the host, `GpuTransferEngine` where a side is a GPU's."""

from kvbm.transfer.choose import PathTable
from kvbm.transfer.engine import CopyResult, TransferEngine
from kvbm.transfer.gpu_engine import GpuTransferEngine
from kvbm.transfer.layers import LayerTransfer, submit_layers

__all__ = ["CopyResult", "GpuTransferEngine", "LayerTransfer", "PathTable", "TransferEngine", "submit_layers"]
