"""TokenSequence: what a hash depends on, incremental equals at once, popping goes back, errors change nothing."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm._backend import Backend
from kvbm.errors import ConfigError, HashFormatError, TokenError
from kvbm.sequence import ContentSpan, TokenSequence, root_key

INGREDIENTS = {"salt": b"tenant-a", "model": "model-x", "weights_epoch": 7, "lora": "adapter"}


def names(sequence: TokenSequence) -> list[str]:
    return [row.tobytes().hex() for row in sequence.hashes]


def extra_of(spans: list[ContentSpan], block: int, block_size: int) -> bytes:
    """The extra bytes of a block, worded from the contract: each token asked whether a span covers it."""
    tokens = range(block * block_size, (block + 1) * block_size)
    extra = b""
    for span in sorted(spans, key=lambda span: (span.start, span.length, span.digest)):
        if any(span.start <= token < span.start + span.length for token in tokens):
            extra += struct.pack("<iI", span.start - tokens[0], len(span.digest)) + span.digest
    return extra


def chain_by_hashlib(tokens, block_size, spans=()) -> list[str]:
    data = b"".join(struct.pack("<I", len(part)) + part for part in (b"", b"", b"", b"", str(block_size).encode()))
    root = hashlib.blake2b(data, digest_size=32, person=b"kvbm-root-v1").digest()
    parent, hashes = bytes(16), []
    for block in range(len(tokens) // block_size):
        words = struct.pack(f"<{block_size}I", *tokens[block * block_size : (block + 1) * block_size])
        message = parent + words + extra_of(list(spans), block, block_size)
        parent = hashlib.blake2b(message, digest_size=16, key=root).digest()
        hashes.append(parent.hex())
    return hashes


def test_root_gives_known_answers(backend: Backend) -> None:
    plain = root_key(block_size=16, backend=backend)
    assert plain.hex() == "e323b420ddc6a28c800aee76a49ce69408458a230f7d2094cbcd8928715660bb"
    full = root_key(block_size=4, **INGREDIENTS, backend=backend)
    assert full.hex() == "42297b5110ce2cad94342942330da24b435b4737b1bba19c5e260f93bb952562"


def test_sequence_gives_known_answers(backend: Backend) -> None:
    sequence = TokenSequence([1, 2, 3, 4, 4294967295, 0, 5, 6], block_size=4, **INGREDIENTS, backend=backend)
    assert names(sequence) == ["3e69a5142a5d22aec57ffd4e73a6ba24", "b4f6cf5497410f11db1c68dc42e9b300"]
    assert names(TokenSequence(range(48), block_size=16, backend=backend)) == [
        "6f61d68077301e4ed9e58ec07a1930fe",
        "9ee9a3acb4eb3fd8ebab5cc6769d514e",
        "f436eaa95e298e5f10264970d82febde",
    ]


def test_sequence_with_content_gives_known_answers(backend: Backend) -> None:
    content = [ContentSpan(1, 2, b"abc")]
    sequence = TokenSequence([1, 2, 3, 4, 5], block_size=2, content=content, backend=backend)
    assert names(sequence) == ["ef2be783657af1fee237089c0b3cf2d6", "d8bebfc794666dd2fb259bf4cbf7df29"]


def test_text_and_bytes_name_the_same_root(backend: Backend) -> None:
    assert root_key(block_size=4, salt="tenant", backend=backend) == root_key(
        block_size=4, salt=b"tenant", backend=backend
    )
    assert root_key(block_size=4, weights_epoch=7, backend=backend) == root_key(
        block_size=4, weights_epoch="7", backend=backend
    )


def test_an_ingredient_never_stands_for_another(backend: Backend) -> None:
    roots = {root_key(block_size=4, **{name: "x"}, backend=backend) for name in INGREDIENTS}
    assert len(roots) == len(INGREDIENTS)


@pytest.mark.parametrize("change", [{"salt": b"b"}, {"model": "y"}, {"weights_epoch": 8}, {"lora": "z"}])
def test_every_ingredient_changes_every_hash(backend: Backend, change: dict) -> None:
    plain = TokenSequence(range(64), block_size=16, **INGREDIENTS, backend=backend)
    other = TokenSequence(range(64), block_size=16, **{**INGREDIENTS, **change}, backend=backend)
    without = TokenSequence(range(64), block_size=16, **{**INGREDIENTS, next(iter(change)): None}, backend=backend)
    assert not set(names(plain)) & set(names(other))
    assert not set(names(plain)) & set(names(without))


def test_block_size_changes_every_hash(backend: Backend) -> None:
    chains = [names(TokenSequence(range(64), block_size=size, backend=backend)) for size in (1, 2, 4, 16, 32)]
    assert len({name for chain in chains for name in chain}) == sum(map(len, chains))


@pytest.mark.parametrize("position", [0, 15, 16, 31, 40, 63])
def test_a_token_changes_hashes_from_its_block_on(backend: Backend, position: int) -> None:
    tokens = np.arange(64)
    changed = tokens.copy()
    changed[position] += 1
    plain = TokenSequence(tokens, block_size=16, backend=backend).hashes
    other = TokenSequence(changed, block_size=16, backend=backend).hashes
    assert ((plain == other).all(axis=1) == (np.arange(4) < position // 16)).all()


def test_token_order_changes_hashes(backend: Backend) -> None:
    assert names(TokenSequence([1, 2], block_size=2, backend=backend)) != names(
        TokenSequence([2, 1], block_size=2, backend=backend)
    )


@pytest.mark.parametrize(("start", "length"), [(0, 1), (15, 1), (16, 1), (15, 2), (20, 30), (63, 1)])
def test_content_changes_hashes_from_the_first_block_it_touches(backend: Backend, start: int, length: int) -> None:
    plain = TokenSequence(range(64), block_size=16, backend=backend)
    chains = [
        TokenSequence(range(64), block_size=16, content=[ContentSpan(start, length, digest)], backend=backend)
        for digest in (b"image", b"imagf", b"i")
    ]
    for sequence in chains:
        assert ((plain.hashes == sequence.hashes).all(axis=1) == (np.arange(4) < start // 16)).all()
    assert len({names(sequence)[-1] for sequence in chains}) == 3


def test_equal_prefixes_have_equal_hashes_whatever_follows(backend: Backend) -> None:
    short = TokenSequence(range(35), block_size=16, backend=backend)
    long = TokenSequence(
        [*range(35), *range(9000, 9100)], block_size=16, content=[ContentSpan(32, 9, b"image")], backend=backend
    )
    assert names(short) == names(long)[:2]


def test_a_partial_last_block_has_no_hash(backend: Backend) -> None:
    for count in range(34):
        sequence = TokenSequence(range(count), block_size=16, backend=backend)
        assert sequence.num_full_blocks == len(sequence.hashes) == count // 16
        assert len(sequence) == sequence.num_tokens == count


def test_parents_are_the_hashes_before(backend: Backend) -> None:
    sequence = TokenSequence(range(70), block_size=16, backend=backend)
    assert sequence.parents.shape == sequence.hashes.shape == (4, 2)
    assert not sequence.parents[0].any()
    np.testing.assert_array_equal(sequence.parents[1:], sequence.hashes[:-1])
    assert TokenSequence(block_size=16, backend=backend).parents.shape == (0, 2)


@pytest.mark.parametrize("block_size", range(1, 201))
def test_sequence_equals_hashlib_at_every_block_size(backend: Backend, block_size: int) -> None:
    tokens = list(range(2 * block_size + 1))
    spans = [ContentSpan(block_size // 2, block_size, b"image"), ContentSpan(0, 1, b"sound" * 30)]
    sequence = TokenSequence(tokens, block_size=block_size, content=spans, backend=backend)
    assert names(sequence) == chain_by_hashlib(tokens, block_size, spans)


token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=60)
span_lists = st.lists(
    st.builds(ContentSpan, st.integers(0, 70), st.integers(1, 40), st.binary(min_size=1, max_size=140)), max_size=4
)


@settings(max_examples=100, deadline=None)
@given(chunks=st.lists(token_lists, max_size=5), block_size=st.integers(1, 20), spans=span_lists)
def test_one_by_one_in_chunks_and_at_once_are_the_same(backend: Backend, chunks, block_size, spans) -> None:
    tokens = [token for chunk in chunks for token in chunk]
    at_once = TokenSequence(tokens, block_size=block_size, content=spans, backend=backend)
    in_chunks = TokenSequence(block_size=block_size, content=spans, backend=backend)
    one_by_one = TokenSequence(block_size=block_size, content=spans, backend=backend)
    late_content = TokenSequence(tokens, block_size=block_size, backend=backend)
    for i, chunk in enumerate(chunks):
        in_chunks.extend(np.array(chunk, dtype=np.uint32) if i % 2 else chunk)
    for token in tokens:
        one_by_one.append(token)
    for span in spans:
        late_content.add_content(span)
    expected = chain_by_hashlib(tokens, block_size, spans)
    for sequence in (at_once, in_chunks, one_by_one, late_content):
        assert names(sequence) == expected
        assert sequence.tokens.tolist() == tokens


@settings(max_examples=100, deadline=None)
@given(
    tokens=token_lists,
    block_size=st.integers(1, 20),
    spans=span_lists,
    steps=st.lists(st.tuples(st.integers(0, 30), token_lists), max_size=6),
)
def test_popping_goes_back_exactly(backend: Backend, tokens, block_size, spans, steps) -> None:
    sequence = TokenSequence(tokens, block_size=block_size, content=spans, backend=backend)
    seen = []
    for num_popped, added in steps:
        count = min(num_popped, len(tokens))
        kept = len(tokens) - count
        assert sequence.pop(count).tolist() == tokens[kept:]
        tokens = tokens[:kept]
        assert names(sequence) == chain_by_hashlib(tokens, block_size, spans)
        seen.append((sequence.hashes, sequence.hashes.copy(), sequence.parents, sequence.parents.copy()))
        sequence.extend(added)
        tokens = tokens + added
        assert names(sequence) == chain_by_hashlib(tokens, block_size, spans)
        assert sequence.tokens.tolist() == tokens
        seen.append((sequence.hashes, sequence.hashes.copy(), sequence.parents, sequence.parents.copy()))
    for hashes, hashes_then, parents, parents_then in seen:
        np.testing.assert_array_equal(hashes, hashes_then)
        np.testing.assert_array_equal(parents, parents_then)


def test_views_are_read_only_and_keep_what_they_showed(backend: Backend) -> None:
    sequence = TokenSequence(range(32), block_size=16, backend=backend)
    view = sequence.hashes
    then = view.copy()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    sequence.truncate(16)
    sequence.extend(range(100, 300))
    sequence.add_content(ContentSpan(0, 4, b"image"))
    np.testing.assert_array_equal(view, then)
    sequence.tokens[:] = 0
    assert sequence.tokens[0] == 0
    assert sequence.tokens[1] == 1


def test_truncate_keeps_the_leading_tokens(backend: Backend) -> None:
    sequence = TokenSequence(range(40), block_size=16, backend=backend)
    sequence.truncate(np.int64(31))
    assert (sequence.num_tokens, sequence.num_full_blocks) == (31, 1)
    assert sequence.pop().tolist() == [30]
    assert sequence.pop(0).tolist() == []
    sequence.truncate(0)
    assert len(sequence) == len(sequence.hashes) == 0


@pytest.mark.parametrize("count", [-1, 6, 1.0, True, None])
def test_pop_and_truncate_refuse_what_is_not_there(backend: Backend, count) -> None:
    sequence = TokenSequence(range(5), block_size=2, backend=backend)
    with pytest.raises(TokenError, match=f"cannot pop {count} tokens, have 5"):
        sequence.pop(count)
    with pytest.raises(TokenError, match=f"cannot truncate to {count} tokens, have 5"):
        sequence.truncate(count)
    assert sequence.tokens.tolist() == list(range(5))


def test_a_copy_is_independent(backend: Backend) -> None:
    sequence = TokenSequence(range(40), block_size=16, salt="a", backend=backend)
    other = sequence.copy()
    other.extend(range(30))
    other.add_content(ContentSpan(17, 2, b"image"))
    sequence.pop(10)
    assert names(sequence) == names(TokenSequence(range(30), block_size=16, salt="a", backend=backend))
    assert other.tokens.tolist() == [*range(40), *range(30)]
    assert other.root == sequence.root


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2, -1], "token -1 at position 2 must be an integer 0..4294967295"),
        ([2**32], "token 4294967296 at position 0 must be an integer 0..4294967295"),
        ([1, 2**80], f"token {2**80} at position 1 must be an integer 0..4294967295"),
        ([1, 1.0], "token 1.0 at position 1 is a float, must be an integer 0..4294967295"),
        ([1, True], "token True at position 1 is a bool, must be an integer 0..4294967295"),
        ([None], "token None at position 0 is a NoneType, must be an integer 0..4294967295"),
        ([1, np.int64(-3)], "token -3 at position 1 must be an integer 0..4294967295"),
        (np.array([5, -2]), "token -2 at position 1 must be an integer 0..4294967295"),
        (np.array([5, -2], np.int8), "token -2 at position 1 must be an integer 0..4294967295"),
        (np.array([0, 2**40], np.uint64), "token 1099511627776 at position 1 must be an integer 0..4294967295"),
        (np.array([1.0]), "integers 0..4294967295, got shape (1,) and dtype float64"),
        (np.array([True]), "integers 0..4294967295, got shape (1,) and dtype bool"),
        (np.zeros((2, 2), int), "integers 0..4294967295, got shape (2, 2) and dtype int64"),
        ("text", "tokens must be integers 0..4294967295, got str"),
        (b"text", "tokens must be integers 0..4294967295, got bytes"),
        (5, "tokens must be integers 0..4294967295, got int"),
    ],
)
def test_a_wrong_token_is_named_and_changes_nothing(backend: Backend, tokens, message: str) -> None:
    sequence = TokenSequence(range(5), block_size=2, backend=backend)
    before = names(sequence)
    with pytest.raises(TokenError) as caught:
        sequence.extend(tokens)
    assert message in str(caught.value)
    assert sequence.tokens.tolist() == list(range(5))
    assert names(sequence) == before
    with pytest.raises(TokenError):
        TokenSequence(tokens, block_size=2, backend=backend)


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, True, "a", None])
def test_append_refuses_a_wrong_token(backend: Backend, token) -> None:
    sequence = TokenSequence(range(3), block_size=4, backend=backend)
    with pytest.raises(TokenError, match="at position 0"):
        sequence.append(token)
    assert sequence.tokens.tolist() == [0, 1, 2]


def test_a_failing_hash_changes_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = TokenSequence(range(7), block_size=4, backend=backend)
    before = names(sequence)

    def fail(*_arguments: object) -> list[bytes]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(sequence, "_extras", fail)
        sequence.add_content(ContentSpan(4, 4, b"image"))  # touches no full block yet
        for change in (lambda: sequence.append(7), lambda: sequence.extend(range(99))):
            with pytest.raises(MemoryError):
                change()
        with pytest.raises(MemoryError):
            sequence.add_content(ContentSpan(0, 1, b"image"))
    assert sequence.tokens.tolist() == list(range(7))
    assert names(sequence) == before
    sequence.append(7)
    assert names(sequence) == chain_by_hashlib(list(range(8)), 4, [ContentSpan(4, 4, b"image")])


@pytest.mark.parametrize(
    "tokens",
    [range(6), (0, 1, 2, 3, 4, 5), iter(range(6)), [np.uint8(t) for t in range(6)]]
    + [np.arange(6).astype(dtype) for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", ">u4", "i8", "u8")]
    + [np.arange(12, dtype=np.uint32)[::2] // 2],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', '')}",
)
def test_every_integer_form_of_tokens_gives_the_same_hashes(tokens) -> None:
    assert names(TokenSequence(tokens, block_size=3)) == chain_by_hashlib(list(range(6)), 3)


@pytest.mark.parametrize("tokens", [(), [], range(0), np.array([]), np.zeros(0, np.int64)])
def test_no_tokens_are_no_blocks(backend: Backend, tokens) -> None:
    sequence = TokenSequence(tokens, block_size=1, backend=backend)
    assert (len(sequence), sequence.num_full_blocks, sequence.hashes.shape) == (0, 0, (0, 2))


@pytest.mark.parametrize("block_size", [0, -1, 1.0, True, "16", None])
def test_a_wrong_block_size_is_refused(block_size) -> None:
    with pytest.raises(ConfigError, match="block size must be an integer of 1 or more tokens"):
        TokenSequence(block_size=block_size)


@pytest.mark.parametrize(
    ("ingredient", "message"),
    [
        ({"salt": 5}, "salt must be bytes or a string, got int"),
        ({"model": b"m"}, "model must be a string, got bytes"),
        ({"weights_epoch": 1.5}, "weights_epoch must be an integer or a string, got float"),
        ({"weights_epoch": True}, "weights_epoch must be an integer or a string, got bool"),
        ({"lora": 3}, "lora must be a string, got int"),
    ],
)
def test_a_wrong_ingredient_is_refused(ingredient: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        root_key(block_size=16, **ingredient)
    assert str(caught.value) == message


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 0), (0, 1.0), (True, 1), (2**31 - 1, 1), (0, 2**31)])
def test_a_span_out_of_range_is_refused(start, length) -> None:
    with pytest.raises(TokenError, match="a content span needs"):
        ContentSpan(start, length, b"image")


@pytest.mark.parametrize("digest", [b"", "image", None])
def test_a_span_needs_a_digest(digest) -> None:
    with pytest.raises(HashFormatError, match="digest of a content span"):
        ContentSpan(0, 1, digest)


def test_content_that_is_no_span_is_refused(backend: Backend) -> None:
    with pytest.raises(TokenError, match="content must be ContentSpan objects, got tuple"):
        TokenSequence(block_size=4, content=[(0, 1, b"image")], backend=backend)


def test_a_sequence_from_hashes_has_hashes_and_no_tokens(backend: Backend) -> None:
    known = TokenSequence(range(40), block_size=16, backend=backend)
    sequence = TokenSequence.from_hashes(known.hashes, block_size=16, backend=backend)
    assert (sequence.num_tokens, sequence.num_full_blocks, sequence.block_size) == (32, 2, 16)
    np.testing.assert_array_equal(sequence.hashes, known.hashes)
    np.testing.assert_array_equal(sequence.copy().parents, known.parents)
    for use in (
        lambda: sequence.tokens,
        lambda: sequence.root,
        lambda: sequence.append(1),
        lambda: sequence.extend([]),
        lambda: sequence.pop(),
        lambda: sequence.truncate(0),
        lambda: sequence.add_content(ContentSpan(0, 1, b"image")),
    ):
        with pytest.raises(TokenError, match="a sequence made from hashes: its tokens are not known"):
            use()
