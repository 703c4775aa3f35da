"""TokenSequence: tokens in, full blocks and their chained sequence hashes out.

Only full blocks have a hash. Hashing is incremental: new full blocks are hashed, taking tokens away drops hashes. A
call that raises changes nothing; an array handed out never changes. Not thread-safe: one request, one sequence.
"""

from __future__ import annotations

import array
import contextlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from kvbm._backend import Backend, default_backend
from kvbm.errors import ConfigError, HashFormatError, TokenError, wrong_block_size
from kvbm.types import HASH_NBYTES, HashArray, hash_array

TokenArray: TypeAlias = "npt.NDArray[np.uint32]"

_MAX_TOKEN = 2**32 - 1
_MAX_SPAN_END = 2**31 - 1  # offsets of spans from blocks are kept as i32
_PERSON = b"kvbm-root-v1"


@dataclass(frozen=True)
class ContentSpan:
    """Content such as an image that stands behind placeholder tokens.

    Parameters
    ----------
    start, length : int
        The tokens it stands behind, counted from the start of the sequence: start .. start + length - 1.
    digest : bytes
        Names the content, e.g. its SHA-256.

    Raises
    ------
    TokenError, HashFormatError
        The tokens are no range within 0..2**31 - 2; the digest is empty or no bytes object.
    """

    start: int
    length: int
    digest: bytes

    def __post_init__(self) -> None:
        is_range = _is_integer(self.start) and _is_integer(self.length) and self.start >= 0 and self.length >= 1
        if not is_range or int(self.start) + int(self.length) > _MAX_SPAN_END:
            raise TokenError(
                f"a content span needs integers start >= 0 and length >= 1, start + length <= {_MAX_SPAN_END}, "
                f"got start {self.start!r} and length {self.length!r}"
            )
        digest: Any = self.digest
        if not isinstance(digest, bytes) or not digest:
            raise HashFormatError(f"digest of a content span must be 1 or more bytes, got {digest!r}")


def root_key(
    *,
    block_size: int,
    salt: bytes | str | None = None,
    model: str | None = None,
    weights_epoch: int | str | None = None,
    lora: str | None = None,
    backend: Backend | None = None,
) -> bytes:
    """Make the root of a chain: what all its hashes depend on beside the tokens.

    Parameters
    ----------
    block_size, salt, model, weights_epoch, lora, backend
        As in `TokenSequence`; None counts as empty, 7 as "7".

    Returns
    -------
    bytes
        32 bytes: BLAKE2b-256, person ``kvbm-root-v1``, over salt, model fingerprint, weights epoch, LoRA name and
        decimal block size, each after its length (u32, little-endian).

    Raises
    ------
    ConfigError
        An argument has another type, or the block size is below 1.
    """
    if not _is_integer(block_size) or block_size < 1:
        raise wrong_block_size(block_size)
    named = (("salt", salt), ("model", model), ("weights_epoch", weights_epoch), ("lora", lora))
    parts = [_ingredient(name, value) for name, value in named] + [b"%d" % block_size]
    data = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return (backend or default_backend()).blake2b(data, digest_size=32, person=_PERSON)


def hashes_from_digests(digests: Iterable[bytes], *, allow_weak_hashes: bool = False) -> HashArray:
    """Take the block digests of an engine as sequence hashes.

    Parameters
    ----------
    digests : iterable of bytes
        Chained already, e.g. SHA-256; what is longer than 16 bytes is cut.
    allow_weak_hashes : bool
        Accept shorter ones, padded with zeros: they may collide, and a collision serves another prompt's cache.

    Returns
    -------
    (num_blocks, 2) uint64, host

    Raises
    ------
    HashFormatError
        A digest is no bytes object, is empty, or is shorter than 16 bytes and weak hashes are not allowed.
    """
    names = []
    digest: Any
    for i, digest in enumerate(digests):
        if not isinstance(digest, (bytes, bytearray)) or not digest:
            raise HashFormatError(f"digest {i} must be 1 or more bytes, got {digest!r}")
        if len(digest) < HASH_NBYTES and not allow_weak_hashes:
            raise HashFormatError(
                f"digest {i} has {len(digest)} bytes, need {HASH_NBYTES}: use a longer hash in the engine, or "
                "allow_weak_hashes=True at the risk of collisions"
            )
        names.append(bytes(digest[:HASH_NBYTES]).ljust(HASH_NBYTES, b"\0"))
    hashes: HashArray = hash_array(names).copy()
    return hashes


class TokenSequence:
    """Tokens of one request, cut into blocks.

    Parameters
    ----------
    tokens : (num_tokens,) integer array, or iterable of integers
        0 to 2**32 - 1.
    block_size : int
        Tokens per block.
    salt : bytes or str, optional
        Keeps tenants apart.
    model, lora : str, optional
        Fingerprint of the model, name of the adapter.
    weights_epoch : int or str, optional
        Tells versions of the weights apart, e.g. while they are trained.
    content : sequence of ContentSpan
        Multimodal content; part of the hash of every block that it touches.
    backend : Backend, optional
        The twin that hashes; the process's by default.

    Raises
    ------
    TokenError, ConfigError
        A token is no integer in range; the block size is below 1, or an ingredient of the root has another type.

    Examples
    --------
    >>> import kvbm
    >>> sequence = kvbm.TokenSequence(range(40), block_size=16)
    >>> sequence.num_full_blocks, len(sequence)
    (2, 40)
    """

    def __init__(
        self,
        tokens: Any = (),
        *,
        block_size: int,
        salt: bytes | str | None = None,
        model: str | None = None,
        weights_epoch: int | str | None = None,
        lora: str | None = None,
        content: Sequence[ContentSpan] = (),
        backend: Backend | None = None,
    ) -> None:
        self._backend = backend = backend or default_backend()
        self._root = root_key(
            block_size=block_size, salt=salt, model=model, weights_epoch=weights_epoch, lora=lora, backend=backend
        )
        self._block_size = int(block_size)
        self._content = _sorted_spans(content)
        self._has_tokens = True
        self._tokens: TokenArray = np.empty(64, dtype=np.uint32)  # grows by doubling
        self._num_tokens = 0
        self._chain: HashArray = np.zeros((8, 2), dtype=np.uint64)  # zeros, then the hashes; grows by doubling
        self._num_hashed = 0
        self._num_written = 0  # hashes that stand in the array, kept or not: a view may show them
        self.extend(tokens)

    @classmethod
    def from_hashes(cls, hashes: Any, *, block_size: int, backend: Backend | None = None) -> TokenSequence:
        """Make a sequence from hashes, e.g. of a trace: (num_blocks, 2) uint64 or 16-byte strings; it has no tokens."""
        names = hash_array(hashes)
        sequence = cls(block_size=block_size, backend=backend)
        sequence._has_tokens = False
        sequence._chain = np.concatenate([np.zeros((1, 2), dtype=np.uint64), names])
        sequence._num_hashed = sequence._num_written = len(names)
        sequence._num_tokens = len(names) * sequence._block_size
        return sequence

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def root(self) -> bytes:
        """Key of the chain: 32 bytes, see `root_key`; unknown (TokenError) where only hashes are known."""
        self._need_tokens("read the root of")
        return self._root

    @property
    def hashes(self) -> HashArray:
        """Sequence hashes of the full blocks: (num_full_blocks, 2) uint64, read-only view."""
        return self._view(1)

    @property
    def parents(self) -> HashArray:
        """Hash before each full block, zeros for the first: (num_full_blocks, 2) uint64, read-only view."""
        return self._view(0)

    @property
    def num_full_blocks(self) -> int:
        """Blocks that are full and have a hash."""
        return self._num_hashed

    @property
    def num_tokens(self) -> int:
        """Tokens, those of the last unfilled block included."""
        return self._num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    @property
    def tokens(self) -> TokenArray:
        """All tokens: (num_tokens,) uint32, a copy."""
        self._need_tokens("read the tokens of")
        tokens: TokenArray = self._tokens[: self._num_tokens].copy()
        return tokens

    def append(self, token: int) -> None:
        """Add one token; raises TokenError like `extend`."""
        if type(token) is not int or not 0 <= token <= _MAX_TOKEN or self._num_tokens == len(self._tokens):
            self.extend((token,))
            return
        self._need_tokens("append to")
        num_tokens = self._num_tokens + 1
        self._tokens[num_tokens - 1] = token
        if num_tokens % self._block_size == 0:
            self._hash(self._num_hashed, num_tokens // self._block_size, self._content)
        self._num_tokens = num_tokens

    def extend(self, tokens: Any) -> None:
        """Add tokens, all or none: (n,) integer array (fastest), or iterable of integers.

        Raises TokenError for a token that is no integer 0..2**32 - 1, with its position among `tokens`.
        """
        self._need_tokens("extend")
        added = _token_array(tokens)
        num_tokens = self._num_tokens + len(added)
        if num_tokens > len(self._tokens):
            spare = np.empty(max(num_tokens, 2 * len(self._tokens)) - self._num_tokens, dtype=np.uint32)
            self._tokens = np.concatenate([self._tokens[: self._num_tokens], spare])
        self._tokens[self._num_tokens : num_tokens] = added
        self._hash(self._num_hashed, num_tokens // self._block_size, self._content)
        self._num_tokens = num_tokens

    def pop(self, n: int = 1) -> TokenArray:
        """Take the last n tokens away and return them in order: (n,) uint32."""
        self._need_tokens("pop from")
        if not _is_integer(n) or not 0 <= n <= self._num_tokens:
            raise TokenError(f"cannot pop {n} tokens, have {self._num_tokens}")
        removed: TokenArray = self._tokens[self._num_tokens - n : self._num_tokens].copy()
        self.truncate(self._num_tokens - n)
        return removed

    def truncate(self, num_tokens: int) -> None:
        """Keep the first num_tokens tokens; content stays, as it may be known before its tokens."""
        self._need_tokens("truncate")
        if not _is_integer(num_tokens) or not 0 <= num_tokens <= self._num_tokens:
            raise TokenError(f"cannot truncate to {num_tokens} tokens, have {self._num_tokens}")
        self._num_tokens = int(num_tokens)
        self._num_hashed = self._num_tokens // self._block_size

    def add_content(self, span: ContentSpan) -> None:
        """Add multimodal content; hashes change from the first block that it touches."""
        self._need_tokens("add content to")
        content = _sorted_spans([*self._content, span])
        first = span.start // self._block_size
        if first < self._num_hashed:
            self._hash(first, self._num_hashed, content)
        self._content = content

    def copy(self) -> TokenSequence:
        """Make an independent sequence with the same tokens, content and root."""
        other = TokenSequence.__new__(TokenSequence)
        other.__dict__.update(self.__dict__)
        other._tokens = self._tokens.copy()
        other._chain = self._chain.copy()
        return other

    def __repr__(self) -> str:
        return f"TokenSequence({self._num_tokens} tokens, {self._num_hashed} full blocks of {self._block_size})"

    def _view(self, first_row: int) -> HashArray:
        view = self._chain[first_row : first_row + self._num_hashed]
        view.flags.writeable = False
        return view

    def _hash(self, first: int, last: int, content: list[ContentSpan]) -> None:
        """Hash blocks first .. last - 1 of the token buffer and make `last` the number of full blocks."""
        if first == last:
            return
        tokens = self._tokens[first * self._block_size : last * self._block_size]
        extras = self._extras(first, last, content) if content else None
        fresh = self._backend.hash_blocks(self._root, self._chain[first].tobytes(), tokens, self._block_size, extras)
        num_rows = len(self._chain)
        if last >= num_rows or first < self._num_written:
            # Also a new array where hashes would be overwritten: a view handed out keeps what it showed.
            chain = np.zeros((num_rows if last < num_rows else max(last + 1, 2 * num_rows), 2), dtype=np.uint64)
            chain[: first + 1] = self._chain[: first + 1]
            self._chain = chain
        self._chain[first + 1 : last + 1] = fresh
        self._num_hashed = self._num_written = last

    def _extras(self, first: int, last: int, content: list[ContentSpan]) -> list[bytes] | None:
        """Describe what touches each block: offset from its first token (i32), length of digest (u32), digest."""
        extras = [b""] * (last - first)
        for span in content:
            start, stop = int(span.start), int(span.start) + int(span.length)
            touched = range(max(start // self._block_size, first), min((stop - 1) // self._block_size + 1, last))
            for block in touched:
                offset = start - block * self._block_size
                extras[block - first] += struct.pack("<iI", offset, len(span.digest)) + span.digest
        return extras if any(extras) else None

    def _need_tokens(self, verb: str) -> None:
        if not self._has_tokens:
            raise TokenError(f"cannot {verb} a sequence made from hashes: its tokens are not known")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _ingredient(name: str, value: Any) -> bytes:
    if value is None:
        return b""
    if name == "salt" and isinstance(value, bytes):
        return value
    if name == "weights_epoch" and _is_integer(value):
        value = str(int(value))
    if not isinstance(value, str):
        kinds = {"salt": "bytes or a string", "weights_epoch": "an integer or a string"}
        raise ConfigError(f"{name} must be {kinds.get(name, 'a string')}, got {type(value).__name__}")
    return value.encode("utf-8", "surrogatepass")


def _sorted_spans(content: Iterable[ContentSpan]) -> list[ContentSpan]:
    spans = list(content)
    for span in spans:
        if not isinstance(span, ContentSpan):
            raise TokenError(f"content must be ContentSpan objects, got {type(span).__name__}")
    return sorted(spans, key=lambda span: (span.start, span.length, span.digest))


def _token_array(tokens: Any) -> npt.NDArray[Any]:
    """Give tokens as a one-dimensional integer array of any width with all values in range."""
    if isinstance(tokens, (str, bytes, bytearray)) or not hasattr(tokens, "__iter__"):
        raise TokenError(f"tokens must be integers 0..{_MAX_TOKEN}, got {type(tokens).__name__}")
    if hasattr(tokens, "__array__"):
        given: npt.NDArray[Any] = np.asarray(tokens)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
            raise TokenError(
                f"tokens must be a one-dimensional array of integers 0..{_MAX_TOKEN}, "
                f"got shape {given.shape} and dtype {given.dtype}"
            )
        if given.size and not np.can_cast(given.dtype, np.uint32) and (given.min() < 0 or given.max() > _MAX_TOKEN):
            position = int(((given < 0) | (given > _MAX_TOKEN)).argmax())
            raise _wrong_token(given[position], position)
        return given
    values = tokens if isinstance(tokens, (list, tuple, range)) else list(tokens)
    if values and set(map(type, values)) <= {int}:
        with contextlib.suppress(OverflowError):  # the loop below names the token
            return np.frombuffer(array.array("I", values), dtype=np.uint32)
    for position, token in enumerate(values):
        if not _is_integer(token) or not 0 <= token <= _MAX_TOKEN:
            raise _wrong_token(token, position)
    return np.array(cast("list[int]", values), dtype=np.uint32)


def _wrong_token(token: Any, position: int) -> TokenError:
    kind = "" if _is_integer(token) else f" is a {type(token).__name__},"
    return TokenError(f"token {token} at position {position}{kind} must be an integer 0..{_MAX_TOKEN}")
