"""The one exception tree.

Every error of kvbm is a ``KvbmError``; the leaves also inherit the nearest builtin, so callers may catch either. All
pickle. The functions at the end build the messages that both twins raise, so that their texts are equal.
"""


class KvbmError(Exception):
    """Base of every error that kvbm raises on purpose."""


class NotEnoughBlocksAvailable(KvbmError, MemoryError):
    """More blocks were asked for than are free or evictable; nothing was taken.

    Parameters
    ----------
    requested, available : int
        Blocks asked for, and blocks that could be had (free + evictable).
    detail : str
        Where: free and evictable counts, pool name.
    """

    def __init__(self, requested: int, available: int, detail: str = "") -> None:
        self.requested = requested
        self.available = available
        self.detail = detail
        super().__init__(requested, available, detail)

    def __str__(self) -> str:
        text = f"need {self.requested} blocks, have {self.available}"
        return f"{text} {self.detail}" if self.detail else text


class BlockStateError(KvbmError, RuntimeError):
    """A block or guard is not in the state that the call needs; nothing changed."""


class BlockIdError(KvbmError, IndexError):
    """A block id lies outside the pool, or is not an integer that fits int32."""


class HashFormatError(KvbmError, ValueError):
    """Sequence hashes were not given as 16-byte hashes."""


class TokenError(KvbmError, ValueError):
    """A token, or a span of tokens, is out of range."""


class LayoutError(KvbmError, ValueError):
    """A layout cannot be built, or an index lies outside it."""


class StorageError(KvbmError, OSError):
    """A storage could not read or write."""


class SlabFormatError(KvbmError, ValueError):
    """The index of a disk slab is damaged, foreign, or of another version."""


class TransferError(KvbmError, RuntimeError):
    """A transfer failed; the cause is chained."""


class TransferCancelled(TransferError):
    """The transfer was cancelled before it finished."""


class TransferTimeout(TransferError, TimeoutError):
    """The transfer did not finish before its deadline."""


class IntegrityError(KvbmError, RuntimeError):
    """Bytes do not match the checksum that was kept for them."""


class MessageError(KvbmError, ValueError):
    """Bytes from another process are not a message of ours."""


class ConfigError(KvbmError, ValueError):
    """A setting is unknown or impossible."""


class TraceError(KvbmError, ValueError):
    """A trace file cannot be read; the message names the file and the line."""


class PoolClosed(KvbmError, RuntimeError):
    """The pool or manager was closed."""


class PluginError(KvbmError, ImportError):
    """A plug-in cannot be found or loaded, or does not keep its contract."""


class BackendError(KvbmError, ImportError):
    """The native twin is absent or broken; the message says what to install or set."""


class CudaError(KvbmError, RuntimeError):
    """A CUDA call failed."""


class DeviceError(CudaError):
    """A call that concerns a device failed, or what it was given is impossible.

    Parameters
    ----------
    call : str
        What was called: ``cudaMalloc``.
    name, code, text : str, int, str
        CUDA's name, number and explanation of the error.
    device : int
        Number of the device; -1 where the call concerns none.
    nbytes : int
        Bytes that the call was about; 0 where that means nothing.
    """

    def __init__(  # noqa: PLR0917  (as pickling gives them back)
        self, call: str, name: str, code: int, text: str, device: int = -1, nbytes: int = 0
    ) -> None:
        self.call = call
        self.name = name
        self.code = code
        self.text = text
        self.device = device
        self.nbytes = nbytes
        super().__init__(call, name, code, text, device, nbytes)

    def __str__(self) -> str:
        size = f" of {self.nbytes} bytes" if self.nbytes else ""
        place = f" on device {self.device}" if self.device >= 0 else ""
        return f"{self.call}{size}{place} failed: {self.name} ({self.code}), {self.text}"


def wrong_state(block_id: int, state: str, needed: str, verb: str) -> BlockStateError:
    """Say that a block cannot be `verb`-ed because of its state."""
    return BlockStateError(f"block {block_id} is {state}, must be {needed} to {verb} it")


def id_out_of_range(block_id: int, num_blocks: int) -> BlockIdError:
    """Say that a block id lies outside the pool."""
    return BlockIdError(f"block id {block_id} is outside 0..{num_blocks - 1}")


def wrong_hashes(got: str) -> HashFormatError:
    """Say what a batch of hashes must look like."""
    return HashFormatError(f"sequence hashes must be a (num_blocks, 2) uint64 array or 16-byte strings, got {got}")


def wrong_ids(got: str) -> BlockIdError:
    """Say what a batch of block ids must look like."""
    return BlockIdError(f"block ids must be a one-dimensional sequence of int32, got {got}")


def length_mismatch(name: str, got: int, needed: int) -> HashFormatError:
    """Say that two batches differ in length."""
    return HashFormatError(f"{name} has {got} entries, need {needed}, one for each block")


def negative_count(count: int) -> BlockIdError:
    """Say that a number of blocks is negative."""
    return BlockIdError(f"cannot allocate {count} blocks, give 0 or more")


def wrong_priority(priority: int) -> ConfigError:
    """Say what a priority may be."""
    return ConfigError(f"priority {priority} is outside 0..100")


def wrong_num_blocks(num_blocks: int) -> ConfigError:
    """Say how many blocks a store may have."""
    return ConfigError(f"a pool needs 1 to 2147483646 blocks, got {num_blocks}")


def in_use(num_blocks: int) -> BlockStateError:
    """Say that a pool cannot be cleared."""
    return BlockStateError(
        f"cannot clear: {num_blocks} blocks are in use (mutable, complete or active), release them first"
    )


def stale_restore(block_id: int) -> BlockStateError:
    """Say that a hash to restore is registered already."""
    return BlockStateError(f"cannot restore block {block_id}: its hash is registered already, or twice in the batch")


def called_back() -> PluginError:
    """Say that an eviction policy called its store."""
    return PluginError("an eviction policy must not call back into the pool that calls it")


def bad_victims(policy: str, reason: str) -> PluginError:
    """Say that an eviction policy broke its contract."""
    return PluginError(f"eviction policy {policy} {reason}; nothing was evicted")


def wrong_token_batch(got: str) -> TokenError:
    """Say what a batch of blocks to hash must look like."""
    return TokenError(
        "blocks to hash need a contiguous uint32 array of whole blocks, a key of 1 to 64 bytes, a parent of 16 bytes "
        f"and one extra for each block, got {got}"
    )


def wrong_hash_input(name: str, needed: str, got: str) -> HashFormatError:
    """Say what an argument of a hash function must be."""
    return HashFormatError(f"{name} must be {needed}, got {got}")


def wrong_block_size(block_size: object) -> ConfigError:
    """Say what a block size may be."""
    return ConfigError(f"block size must be an integer of 1 or more tokens, got {block_size!r}")


def wrong_addresses(name: str, got: str) -> LayoutError:
    """Say what a batch of addresses or offsets must look like."""
    return LayoutError(f"{name} must be a one-dimensional uint64 array, as long as its counterpart, got {got}")


def wrong_piece_nbytes(piece_nbytes: int) -> LayoutError:
    """Say how long a piece of a block may be."""
    return LayoutError(f"piece_nbytes is {piece_nbytes}, give 1 or more bytes")


def wrong_num_threads(num_threads: int) -> ConfigError:
    """Say how many threads a copy may use."""
    return ConfigError(f"num_threads is {num_threads}, give 1 or more")
