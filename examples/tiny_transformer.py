"""A small transformer that keeps its keys and values in our blocks and reuses a prefix, bit for bit.

Random weights, NumPy only. The prompt is prefilled one block of tokens at a time, so with and without reuse each
block is computed by the same operations on the same shapes, and the logits must be equal exactly, not just close.
Run it: ``python examples/tiny_transformer.py``.
"""

import os

import numpy as np
import numpy.typing as npt

import kvbm

os.environ["KVBM_DEVICE"] = "cpu"  # NumPy looks into blocks here, and sees none in a GPU's memory

VOCABULARY, LAYERS, HEADS, HEAD_SIZE, PAGE = 256, 4, 4, 16, 16
WIDTH = HEADS * HEAD_SIZE
Array = npt.NDArray[np.float32]


class TinyTransformer:
    """A decoder of a few layers: attention, then a two-layer network, each added to the residual stream."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def weights(*shape: int) -> Array:
            return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)

        self.embedding = weights(VOCABULARY, WIDTH)
        self.qkv = weights(LAYERS, WIDTH, 3 * WIDTH)
        self.out = weights(LAYERS, WIDTH, WIDTH)
        self.up = weights(LAYERS, WIDTH, 4 * WIDTH)
        self.down = weights(LAYERS, 4 * WIDTH, WIDTH)

    def forward(self, token_ids: list[int], start: int, cache: Array) -> Array:
        """Compute the tokens from position `start` on, reading and writing keys and values in the cache.

        Parameters
        ----------
        token_ids : list of int
            The tokens to compute; those before `start` are in the cache.
        start : int
            Position of the first of them.
        cache : (LAYERS, 2, max_tokens, WIDTH) float32
            Keys and values by position; filled for the computed tokens.

        Returns
        -------
        (num_tokens, VOCABULARY) float32
            Logits.
        """
        stop = start + len(token_ids)
        positions = np.arange(start, stop, dtype=np.float32)[:, None]
        x = self.embedding[token_ids] + np.sin(positions / 10 ** np.linspace(0, 3, WIDTH, dtype=np.float32))
        is_visible = np.arange(stop)[None, :] <= np.arange(start, stop)[:, None]
        for layer in range(LAYERS):
            query, key, value = np.split(normalise(x) @ self.qkv[layer], 3, axis=1)
            cache[layer, 0, start:stop], cache[layer, 1, start:stop] = key, value
            keys, values = cache[layer, 0, :stop], cache[layer, 1, :stop]
            mixed = np.empty_like(query)
            for head in range(HEADS):
                columns = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
                scores = query[:, columns] @ keys[:, columns].T / np.float32(np.sqrt(HEAD_SIZE))
                mixed[:, columns] = softmax(np.where(is_visible, scores, np.float32(-1e30))) @ values[:, columns]
            x = x + mixed @ self.out[layer]
            x = x + np.maximum(normalise(x) @ self.up[layer], 0) @ self.down[layer]
        return np.asarray(normalise(x) @ self.embedding.T, dtype=np.float32)


def normalise(x: Array) -> Array:
    """Scale each row to unit mean square."""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(1e-6)), dtype=np.float32)


def softmax(scores: Array) -> Array:
    """Turn each row into weights that add up to one."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float32)


def prefill(model: TinyTransformer, prompt: list[int], manager: kvbm.BlockManager | None) -> tuple[Array, int]:
    """Compute a prompt, through the manager's blocks where there is one; give the last logits and tokens skipped."""
    cache = np.zeros((LAYERS, 2, len(prompt), WIDTH), dtype=np.float32)
    if manager is None:
        return compute(model, prompt, 0, cache), 0

    sequence = manager.sequence(prompt)
    # The last token's logits are needed, so at least one token has to be computed.
    num_usable = min(sequence.num_full_blocks, (len(prompt) - 1) // PAGE)
    blocks = manager.onboard(manager.match_sequence_hashes(sequence.hashes[:num_usable])).result()
    num_hits = len(blocks)
    for index, block in enumerate(blocks):
        for layer in range(LAYERS):
            cache[layer, :, index * PAGE : (index + 1) * PAGE] = block.layer(layer).numpy()

    logits = compute(model, prompt, num_hits * PAGE, cache)

    fresh = manager.allocate_blocks(sequence.num_full_blocks - num_hits)
    for index, block in enumerate(fresh, start=num_hits):
        for layer in range(LAYERS):
            block.layer(layer).numpy()[...] = cache[layer, :, index * PAGE : (index + 1) * PAGE]
    parent = blocks[-1].sequence_hash if blocks else None
    request = blocks + manager.register_blocks(fresh.complete(sequence.hashes[num_hits:], parent=parent))
    request.release()
    return logits, num_hits * PAGE


def compute(model: TinyTransformer, prompt: list[int], start: int, cache: Array) -> Array:
    """Prefill from `start` in steps of one block; give the logits of the last token."""
    for first in range(start, len(prompt), PAGE):
        logits = model.forward(prompt[first : first + PAGE], first, cache)
    return np.asarray(logits[-1])


model = TinyTransformer(seed=0)
rng = np.random.default_rng(1)
system_prompt = rng.integers(0, VOCABULARY, 100).tolist()
questions = [rng.integers(0, VOCABULARY, 45).tolist() for _ in range(2)]

with kvbm.BlockManager(
    num_layers=LAYERS, page_size=PAGE, inner_dim=WIDTH, dtype="float32", device_blocks=64, model="tiny-transformer-0"
) as manager:
    for number, question in enumerate(questions, start=1):
        prompt = [*system_prompt, *question]
        expected, _ = prefill(model, prompt, None)
        logits, num_skipped = prefill(model, prompt, manager)
        assert np.array_equal(logits, expected), "reuse changed the logits"
        print(f"request {number}: {num_skipped} of {len(prompt)} tokens of prefill skipped, logits equal bit for bit")
    assert num_skipped == len(system_prompt) // PAGE * PAGE
    manager.check()
