"""Makes a workload where there is no trace: conversations of several turns that share system prompts.

Everything is drawn from one seed, so a run can be repeated. Requests are made one by one, when they are asked for: only
the conversations so far are held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvbm.replay.traces import TraceRequest

_MEAN_GAP_S = 0.1


def generate_conversations(
    *, num_sessions: int = 200, num_turns: int = 5, num_prompts: int = 4, seed: int = 0
) -> Iterator[TraceRequest]:
    """Make requests as tokens, the turns of all sessions mixed.

    Parameters
    ----------
    num_sessions, num_turns : int
        Conversations, and requests in each.
    num_prompts : int
        System prompts of 512 to 2,047 tokens, one of them at the head of each conversation.
    seed : int

    Yields
    ------
    TraceRequest
        num_sessions * num_turns of them. Each repeats its conversation so far and adds a question of 32 to 511
        tokens; the answer of 64 to 767 tokens is part of the next one. They come at random, ten a second.
    """
    rng = np.random.default_rng(seed)
    gaps, time_s = np.random.default_rng([seed, 1]), 0.0

    def draw(low: int, high: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return rng.integers(0, 128_000, int(rng.integers(low, high)), dtype=np.uint32)

    prompts = [draw(512, 2048) for _ in range(num_prompts)]
    histories = [prompts[int(rng.integers(num_prompts))] for _ in range(num_sessions)]
    turns = rng.permutation(np.repeat(np.arange(num_sessions), num_turns))
    for session in turns.tolist():
        question = np.concatenate([histories[session], draw(32, 512)])
        time_s += gaps.exponential(_MEAN_GAP_S)
        yield TraceRequest(tokens=question, time_s=time_s, session=str(session))
        histories[session] = np.concatenate([question, draw(64, 768)])
