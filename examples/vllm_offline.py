"""The same long prompt twice in two lives of vLLM: the second finds its blocks on disk and skips the prefill.

    python examples/vllm_offline.py MODEL --disk /nvme/kvbm

Each life is a process of its own, as a restart is. Needs vLLM beside kvbm; MODEL is whatever ``vllm serve`` takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def serve(model: str, disk: str, prompt: list[int], arguments: dict[str, Any]) -> tuple[tuple[int, ...], int, float]:
    """Start an engine, ask once, stop; give the text's tokens, how many of the prompt's were cached, and seconds."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=model,
        enable_prefix_caching=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvbmConnector",
            kv_connector_module_path="kvbm.engines.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"host": "1GiB", "disk": {"path": disk, "size": "4GiB"}},
        ),
        **arguments,
    )
    greedy = SamplingParams(temperature=0, max_tokens=16)
    warm_up = [token + 1 for token in prompt]  # another prompt: the first request of a process is a slow one
    llm.generate([{"prompt_token_ids": warm_up}], greedy, use_tqdm=False)
    began_at = time.perf_counter()
    (out,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    seconds = time.perf_counter() - began_at
    llm.generate([{"prompt_token_ids": warm_up[:8]}], greedy, use_tqdm=False)  # blocks are saved with further steps
    llm.llm_engine.engine_core.shutdown()
    return tuple(out.outputs[0].token_ids), out.num_cached_tokens, seconds


def main() -> None:
    """Ask in two processes and compare."""
    parser = argparse.ArgumentParser(description="One prompt in two lives of vLLM, warm the second time.")
    parser.add_argument("model")
    parser.add_argument("--disk", required=True, metavar="FOLDER", help="where the disk tier lies")
    parser.add_argument("--tokens", type=int, default=4000, help="of the prompt (default %(default)s)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="do not compile the model: it starts sooner")
    given = parser.parse_args()
    prompt = [10 + i * i % 500 for i in range(given.tokens)]
    arguments = {"max_model_len": given.tokens + 32, "dtype": given.dtype, "enforce_eager": given.eager}
    texts = []
    for life in ("first", "second"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            text, num_cached, seconds = pool.submit(serve, given.model, given.disk, prompt, arguments).result()
        texts.append(text)
        print(f"{life} life: {seconds:6.2f} s, {num_cached} of {given.tokens} tokens cached")
    assert texts[0] == texts[1], "the text must not depend on where blocks come from"
    print("the text is the same")


if __name__ == "__main__":
    main()
