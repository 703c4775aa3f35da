"""BLAKE2b and the chain of block hashes: known answers, every length around a compression, twins equal."""

from __future__ import annotations

import hashlib
import struct
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend, load_backend
from kvbm.errors import HashFormatError, KvbmError, TokenError
from kvbm.types import SequenceHash

KEY = bytes(range(32))
ZERO = bytes(16)


def chain_by_hashlib(key, parent, tokens, block_size, extras=None):
    """The chain as the design words it, independent of both twins."""
    hashes = b""
    for i in range(len(tokens) // block_size):
        block = struct.pack(f"<{block_size}I", *(int(t) for t in tokens[i * block_size : (i + 1) * block_size]))
        message = parent + block + (extras[i] if extras is not None else b"")
        parent = hashlib.blake2b(message, digest_size=16, key=key).digest()
        hashes += parent
    return hashes


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def test_blake2b_gives_the_answer_of_rfc_7693(backend: Backend) -> None:
    expected = (
        "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
        "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923"
    )
    assert backend.blake2b(b"abc", digest_size=64).hex() == expected


def test_blake2b_equals_hashlib_at_every_length(backend: Backend) -> None:
    data = tokens_of(128).tobytes()
    for length in range(len(data) + 1):
        for key in (b"", KEY):
            expected = hashlib.blake2b(data[:length], digest_size=32, key=key).digest()
            assert backend.blake2b(data[:length], digest_size=32, key=key) == expected


def test_blake2b_equals_hashlib_at_every_digest_key_and_person_size(backend: Backend) -> None:
    for size in range(1, 65):
        key, person = bytes(range(size)), bytes(range(1, 1 + size % 17))
        expected = hashlib.blake2b(b"block", digest_size=size, key=key, person=person).digest()
        assert backend.blake2b(b"block", digest_size=size, key=key, person=person) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digest_size": 0}, "digest_size must be 1 to 64 bytes, got 0"),
        ({"digest_size": 65}, "digest_size must be 1 to 64 bytes, got 65"),
        ({"digest_size": 16, "key": bytes(65)}, "key must be 0 to 64 bytes, got 65"),
        ({"digest_size": 16, "person": bytes(17)}, "person must be 0 to 16 bytes, got 17"),
        ({"digest_size": 16, "key": "text"}, "key must be bytes, got str"),
    ],
)
def test_blake2b_refuses_sizes_out_of_range(backend: Backend, arguments: dict, message: str) -> None:
    with pytest.raises(HashFormatError) as caught:
        backend.blake2b(b"", **arguments)
    assert str(caught.value) == message


def test_hash_blocks_gives_known_answers(backend: Backend) -> None:
    hashes = backend.hash_blocks(
        bytes.fromhex("e323b420ddc6a28c800aee76a49ce69408458a230f7d2094cbcd8928715660bb"),
        ZERO,
        np.arange(48, dtype=np.uint32),
        16,
    )
    assert [row.tobytes().hex() for row in hashes] == [
        "6f61d68077301e4ed9e58ec07a1930fe",
        "9ee9a3acb4eb3fd8ebab5cc6769d514e",
        "f436eaa95e298e5f10264970d82febde",
    ]


@pytest.mark.parametrize("block_size", range(1, 201))
def test_hash_blocks_equals_hashlib_at_every_block_size(backend: Backend, block_size: int) -> None:
    tokens = tokens_of(3 * block_size, seed=block_size)
    parent = bytes(range(16))
    hashes = backend.hash_blocks(KEY, parent, tokens, block_size)
    assert hashes.shape == (3, 2)
    assert hashes.dtype == np.uint64
    assert hashes.flags.c_contiguous
    assert hashes.flags.writeable
    assert hashes.tobytes() == chain_by_hashlib(KEY, parent, tokens, block_size)


@pytest.mark.parametrize("block_size", [1, 16, 28, 60])
def test_hash_blocks_takes_extras_of_every_length(backend: Backend, block_size: int) -> None:
    # parent, tokens and extra together cross one or two compressions of 128 bytes
    extras = [bytes([length & 255]) * length for length in range(300)]
    tokens = tokens_of(block_size * len(extras))
    hashes = backend.hash_blocks(KEY, ZERO, tokens, block_size, extras)
    assert hashes.tobytes() == chain_by_hashlib(KEY, ZERO, tokens, block_size, extras)


def test_hash_blocks_takes_an_empty_extra_as_none(backend: Backend) -> None:
    tokens = tokens_of(64)
    expected = backend.hash_blocks(KEY, ZERO, tokens, 16)
    np.testing.assert_array_equal(backend.hash_blocks(KEY, ZERO, tokens, 16, [b""] * 4), expected)


@pytest.mark.parametrize("num_blocks", [0, 1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("has_extras", [False, True])
def test_hash_blocks_chains_batches_of_every_size(backend: Backend, num_blocks: int, has_extras: bool) -> None:
    tokens = tokens_of(4 * num_blocks)
    extras = [b"x" * (i % 5) for i in range(num_blocks)] if has_extras else None
    hashes = backend.hash_blocks(KEY, ZERO, tokens, 4, extras)
    assert hashes.shape == (num_blocks, 2)
    assert hashes.tobytes() == chain_by_hashlib(KEY, ZERO, tokens, 4, extras)


def test_hash_blocks_continues_a_chain_from_its_parent(backend: Backend) -> None:
    tokens = tokens_of(160)
    whole = backend.hash_blocks(KEY, ZERO, tokens, 16)
    rest = backend.hash_blocks(KEY, whole[3].tobytes(), tokens[64:], 16)
    np.testing.assert_array_equal(rest, whole[4:])


def test_hash_blocks_reads_read_only_tokens(backend: Backend) -> None:
    tokens = tokens_of(32)
    tokens.flags.writeable = False
    assert backend.hash_blocks(KEY, ZERO, tokens, 16).tobytes() == chain_by_hashlib(KEY, ZERO, tokens, 16)


def test_hash_blocks_is_the_same_from_many_threads(backend: Backend) -> None:
    tokens = tokens_of(2048)
    expected = chain_by_hashlib(KEY, ZERO, tokens, 1)
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(backend.hash_blocks(KEY, ZERO, tokens, 1).tobytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


FOUR = np.arange(4, dtype=np.uint32)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ((KEY, ZERO, FOUR, 3), "4 tokens in blocks of 3"),
        ((KEY, ZERO, FOUR, 0), "4 tokens in blocks of 0"),
        ((KEY, ZERO, FOUR, -2), "4 tokens in blocks of -2"),
        ((b"", ZERO, FOUR, 2), "a key of 0 and a parent of 16 bytes"),
        ((bytes(65), ZERO, FOUR, 2), "a key of 65 and a parent of 16 bytes"),
        ((KEY, bytes(15), FOUR, 2), "a key of 32 and a parent of 15 bytes"),
        ((KEY, "parent", FOUR, 2), "a key in a bytes and a parent in a str"),
        ((KEY, ZERO, [1, 2], 2), "tokens in a list"),
        ((KEY, ZERO, FOUR.astype(np.int64), 2), "tokens of shape (4,) and dtype int64"),
        ((KEY, ZERO, FOUR.astype(">u4"), 2), "tokens of shape (4,) and dtype >u4"),
        ((KEY, ZERO, FOUR.reshape(2, 2), 2), "tokens of shape (2, 2) and dtype uint32"),
        ((KEY, ZERO, FOUR[::2], 2), "tokens of shape (2,) and dtype uint32"),
        ((KEY, ZERO, FOUR, 2, [b""]), "1 extras for 2 blocks"),
        ((KEY, ZERO, FOUR, 2, [b"", None]), "an extra in a NoneType"),
    ],
)
def test_hash_blocks_refuses_what_it_cannot_hash(backend: Backend, arguments: tuple, got: str) -> None:
    with pytest.raises(TokenError) as caught:
        backend.hash_blocks(*arguments)
    assert str(caught.value).endswith(f", got {got}")


@settings(max_examples=150, deadline=None)
@given(
    key=st.binary(min_size=0, max_size=66),
    parent=st.one_of(st.binary(min_size=16, max_size=16), st.binary(max_size=20)),
    block_size=st.integers(0, 70),
    num_blocks=st.integers(0, 6),
    spare=st.integers(0, 1),
    extras=st.one_of(st.none(), st.lists(st.binary(max_size=260), max_size=6)),
    seed=st.integers(0, 2**32 - 1),
)
def test_hash_blocks_equals_the_pure_twin_in_hashes_and_errors(
    backend, key, parent, block_size, num_blocks, spare, extras, seed
) -> None:
    tokens = tokens_of(block_size * num_blocks + spare, seed)
    if extras is not None and len(extras) > num_blocks:
        extras = extras[:num_blocks]
    answers = []
    for twin in (load_backend("pure"), backend):
        try:
            answers.append(twin.hash_blocks(key, parent, tokens, block_size, extras).tobytes())
        except KvbmError as error:
            answers.append((type(error), str(error)))
    assert answers[1] == answers[0]
    if isinstance(answers[0], bytes):
        assert answers[0] == chain_by_hashlib(key, parent, tokens, block_size, extras)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=520),
    digest_size=st.integers(0, 66),
    key=st.binary(max_size=66),
    person=st.binary(max_size=18),
)
def test_blake2b_equals_the_pure_twin_in_digests_and_errors(backend, data, digest_size, key, person) -> None:
    answers = []
    for twin in (load_backend("pure"), backend):
        try:
            answers.append(twin.blake2b(data, digest_size=digest_size, key=key, person=person))
        except KvbmError as error:
            answers.append((type(error), str(error)))
    assert answers[1] == answers[0]


def test_subclasses_of_bytes_are_hashed_as_bytes(backend: Backend) -> None:
    class Name(bytes):
        pass

    tokens = tokens_of(8)
    plain = backend.hash_blocks(KEY, ZERO, tokens, 4, [b"a", b"b"])
    given_names = backend.hash_blocks(Name(KEY), SequenceHash(ZERO), tokens, 4, [Name(b"a"), Name(b"b")])
    assert np.array_equal(plain, given_names)
    answer = backend.blake2b(Name(b"data"), digest_size=8, key=Name(b"key"), person=Name(b"me"))
    assert answer == backend.blake2b(b"data", digest_size=8, key=b"key", person=b"me")
