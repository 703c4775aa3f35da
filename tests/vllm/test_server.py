"""The OpenAI server: many clients, some of whom hang up, and a server that is killed and started again."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vllm_server import Answer, Server
from vllm_site import QUIET_S, Engine, Texts, Tokens, needs_vllm, prompt_of

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


def keep(server: Server, prompts: list[Tokens], texts: Texts) -> None:
    """Have prompts served that the server has never seen, and wait until their blocks are on its disk."""
    assert [server.ask(prompt) for prompt in prompts] == [Answer(text, 0) for text in texts]
    num_blocks = sum(len(prompt) // 64 for prompt in prompts)
    until = time.monotonic() + QUIET_S
    while server.blocks_in("disk") < num_blocks:
        server.ask(prompts[0][:10], 1)  # metrics come with steps
        assert time.monotonic() < until, f"{server.blocks_in('disk')} of {num_blocks} blocks are on the disk"


def test_clients_that_hang_up_and_a_server_that_is_killed_change_no_text(
    start: Start, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = [prompt for client in range(NUM_CLIENTS) for prompt, pieces in requests_of(client) if pieces is None]
    whole_memory = prompt_of(70, (NUM_BLOCKS - 1) * 64 - 16)
    # No more than 8 blocks each: a quarter of the host tier may be under way to it. And no text fills a block.
    kept = [prompt_of(71 + seed, num_tokens) for seed, num_tokens in enumerate((480, 300, 512, 65))]
    engine = start(has_connector=False)
    texts, _ = engine.generate([*prompts, whole_memory, *kept])
    engine.close()
    whole_memory_text, kept_texts = texts[len(prompts)], texts[len(prompts) + 1 :]
    expected = dict(zip(map(tuple, prompts), texts, strict=False))
    tiers = {"host": "4MiB", "disk": {"path": str(tmp_path), "size": "64MiB"}, "always_load": True}
    few_blocks = ("--num-gpu-blocks-override", str(NUM_BLOCKS))
    with Server(model_of("llama"), tiers, *few_blocks) as server:
        keep(server, kept, kept_texts)
        answers = run_clients(server)
        assert {prompt: answer.tokens for prompt, answer in answers.items()} == expected
        longest = server.ask(whole_memory)
        assert longest is not None
        assert longest.tokens == whole_memory_text, "or it waits for ever for a block of those who hung up"
        with clients_at_work(server):
            server.kill()
    with Server(model_of("llama"), tiers, *few_blocks) as server:
        found = [server.ask(prompt) for prompt in kept]
        assert found == [Answer(*one) for one in zip(kept_texts, (448, 256, 448, 64), strict=True)], "the disk is warm"
        answers = run_clients(server)
        assert {prompt: answer.tokens for prompt, answer in answers.items()} == expected
