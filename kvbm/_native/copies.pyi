import numpy as np
import numpy.typing as npt

from kvbm.types import HashArray

def copy_blocks(
    source_blocks: npt.NDArray[np.uint64],
    destination_blocks: npt.NDArray[np.uint64],
    source_pieces: npt.NDArray[np.uint64],
    destination_pieces: npt.NDArray[np.uint64],
    piece_nbytes: int,
    *,
    hashes: HashArray | None = ...,
    num_threads: int = ...,
) -> npt.NDArray[np.uint64] | None: ...
def checksum_blocks(
    blocks: npt.NDArray[np.uint64],
    pieces: npt.NDArray[np.uint64],
    piece_nbytes: int,
    hashes: HashArray,
    *,
    num_threads: int = ...,
) -> npt.NDArray[np.uint64]: ...
def memcpy_blocks(
    source_blocks: npt.NDArray[np.uint64],
    destination_blocks: npt.NDArray[np.uint64],
    source_pieces: npt.NDArray[np.uint64],
    destination_pieces: npt.NDArray[np.uint64],
    piece_nbytes: int,
) -> None: ...
def cpu_features() -> tuple[str, ...]: ...
def kernel() -> str: ...
