"""The OpenAI server: many clients, some of whom hang up, and a server that is killed and started again."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vllm_server import Answer, Server
from vllm_site import Engine, Tokens, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
NUM_CLIENTS, NUM_EACH = 8, 12
NUM_BLOCKS = 33  # of the engine, one of which it never gives out: the longest request needs all others
STEMS = [prompt_of(60 + seed, 640) for seed in range(4)]
LEFT_EVERY = 3  # of this many requests one is left


def requests_of(client: int) -> list[tuple[Tokens, int | None]]:
    """Give a client's prompts, and after how many pieces it hangs up, or that it does not."""
    rng = random.Random(client)
    stems = [rng.choice(STEMS)[: rng.randrange(1, 641)] for _ in range(NUM_EACH)]
    prompts = [[*stem, *prompt_of(rng.randrange(3), rng.randrange(1, 40))] for stem in stems]
    return [
        (prompt, rng.randrange(1, 12) if number % LEFT_EVERY == 1 else None) for number, prompt in enumerate(prompts)
    ]


def run_clients(server: Server) -> dict[tuple[int, ...], Answer]:
    """Let all clients ask at once; give the answer of each prompt that had one."""

    def run(client: int) -> list[tuple[Tokens, Answer | None]]:
        return [(prompt, server.ask(prompt, leave_after=pieces)) for prompt, pieces in requests_of(client)]

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = [one for part in pool.map(run, range(NUM_CLIENTS)) for one in part]
    return {tuple(prompt): answer for prompt, answer in answers if answer is not None}


@contextmanager
def clients_at_work(server: Server) -> Iterator[None]:
    """Have clients under way while the body runs; they stop when they lose their server."""
    has_answer = threading.Event()

    def run(client: int) -> None:
        try:
            while True:
                for prompt, pieces in requests_of(client):
                    server.ask(prompt, leave_after=pieces)
                    has_answer.set()
        except (OSError, http.client.HTTPException):
            has_answer.set()

    clients = [threading.Thread(target=run, args=(client,)) for client in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    assert has_answer.wait(60.0)
    yield
    for client in clients:
        client.join()


def test_clients_that_hang_up_and_a_server_that_is_killed_change_no_text(
    start: Start, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = [prompt for client in range(NUM_CLIENTS) for prompt, pieces in requests_of(client) if pieces is None]
    whole_memory = prompt_of(70, (NUM_BLOCKS - 1) * 64 - 16)
    kept = prompt_of(71, 500)
    engine = start(has_connector=False)
    texts, _ = engine.generate([*prompts, whole_memory, kept])
    engine.close()
    expected = dict(zip(map(tuple, prompts), texts, strict=False))
    tiers = {"host": "4MiB", "disk": {"path": str(tmp_path), "size": "64MiB"}, "always_load": True}
    few_blocks = ("--num-gpu-blocks-override", str(NUM_BLOCKS))
    with Server(model_of("llama"), tiers, *few_blocks) as server:
        assert server.ask(kept) == Answer(texts[-1], 0)
        answers = run_clients(server)
        assert {prompt: answer.tokens for prompt, answer in answers.items()} == expected
        longest = server.ask(whole_memory)
        assert longest is not None
        assert longest.tokens == texts[-2], "or it waits for ever for a block of those who hung up"
        with clients_at_work(server):
            server.kill()
    with Server(model_of("llama"), tiers, *few_blocks) as server:
        assert server.ask(kept) == Answer(texts[-1], 448), "the disk is warm"
        answers = run_clients(server)
        assert {prompt: answer.tokens for prompt, answer in answers.items()} == expected
        assert sum(answer.num_cached for answer in answers.values()) > 0
