"""The real vLLM in this process: tiny models with random weights, one engine at a time, and a look into its halves.

vLLM is imported inside functions: this module can be read where it is not installed.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvbm.engines.vllm.features import feature

_spec = importlib.util.find_spec("vllm")
HAS_VLLM = _spec is not None and _spec.origin is not None  # a folder of this name has no origin
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),  # a busy machine, and vLLM's import, take their time
    pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed: nox -s vllm installs it"),
    pytest.mark.filterwarnings("ignore", "error::pytest.PytestUnhandledThreadExceptionWarning"),
]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine, scheduler and worker in this process: it starts in 2 s
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
QUIET_S = 60.0

Tokens = list[int]
Texts = list[tuple[int, ...]]


def has_fixed_names() -> bool:
    """Whether this vLLM names a block alike in every process, without being told how to begin."""
    return feature("fixed names") is not None


def need_feature(name: str) -> None:
    """Skip the test where this vLLM lacks something."""
    if feature(name) is None:
        pytest.skip(f"this vLLM has no {name}")


def need_model(kind: str) -> None:
    """Skip the test where this vLLM cannot run such a model, or not with a connector."""
    if kind == "gemma3":
        need_feature("named failures")
    if kind == "deepseek" and importlib.util.find_spec("vllm.v1.attention.backends.mla.prefill.cpu_sdpa") is None:
        pytest.skip("this vLLM has no MLA for the CPU")


def keep_the_prefix_cache(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM keep its prefix cache, and chunks, for MLA: it turns both off for CPUs without AMX.

    A text from cached blocks is not the cold one there, with or without a connector, so only hits can be compared.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_keep(config: Any) -> None:
        steps = config.scheduler_config
        asked = steps.enable_chunked_prefill, steps.max_num_batched_tokens
        check(config)
        steps.enable_chunked_prefill, steps.max_num_batched_tokens = asked
        config.cache_config.enable_prefix_caching = True

    patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_keep))


def prompt_of(seed: int, num_tokens: int) -> Tokens:
    """Give a prompt that no other seed begins with."""
    rng = random.Random(seed)
    return [rng.randrange(5, 1000) for _ in range(num_tokens)]


def make_model(kind: str, folder: Path) -> Path:
    """Write a model with random weights; `initializer_range` makes its text depend on every block of the context."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = BpeTrainer(vocab_size=1024, special_tokens=specials, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator(["hello world this is a test of a tiny model "] * 10, trainer)
    bos, eos, pad = specials
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    common = {"vocab_size": 1024, "max_position_embeddings": 32768, "tie_word_embeddings": False}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model: Any
    if kind in ("llama", "mha"):  # two heads share keys and values, or each has its own
        heads = {"num_key_value_heads": 2 if kind == "llama" else 4, "head_dim": 32}
        model = LlamaForCausalLM(LlamaConfig(**common, **shape, **heads, initializer_range=0.15))
    elif kind == "llama26m":  # large enough for its first token to take its time
        wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
        heads = {"num_key_value_heads": 4, "head_dim": 64}
        model = LlamaForCausalLM(LlamaConfig(**common, **wide, **heads, initializer_range=0.06))
    elif kind == "gemma3":
        heads = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 128, "query_pre_attn_scalar": 32}
        layers = ["sliding_attention", "full_attention"] * 2
        config = Gemma3TextConfig(**common, **shape, **heads, layer_types=layers, initializer_range=0.15)
        model = Gemma3ForCausalLM(config)
    elif kind == "deepseek":
        latent = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
        latent |= {"v_head_dim": 128, "head_dim": 64, "num_key_value_heads": 4}
        dense = {"first_k_dense_replace": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        dense |= {"moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
        shape["num_hidden_layers"] = 3
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**common, **shape, **latent, **dense, initializer_range=0.1))
    else:
        raise ValueError(f"no model {kind!r}")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


class Engine:
    """One engine with `KvbmConnector`.

    Parameters
    ----------
    model : Path
    disk : Path, optional
        Folder of the disk tier.
    extra : dict, optional
        ``kv_connector_extra_config``; default: 64 MiB of host memory and 128 MiB of disk, where a folder is given.
    policy : str, optional
        ``kv_load_failure_policy``; None leaves it to vLLM.
    has_connector : bool
    learns_speed : bool
        Let the core learn what computing costs; without, it loads whatever there is, as tests of loads need it: these
        models compute faster than anything can be loaded.
    arguments
        Of `vllm.LLM`.
    """

    def __init__(
        self,
        model: Path,
        *,
        disk: Path | None = None,
        extra: dict[str, Any] | None = None,
        policy: str | None = "recompute",
        has_connector: bool = True,
        learns_speed: bool = False,
        **arguments: Any,
    ) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if extra is None:
            extra = {"host": "64MiB"}
            if disk is not None:
                extra["disk"] = {"path": str(disk), "size": "128MiB"}
        if not learns_speed:
            extra = {**extra, "always_load": True}
        given: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 2048,
            "block_size": 64,
            "enable_prefix_caching": True,
            "disable_log_stats": False,
        }
        if has_connector:
            given["kv_transfer_config"] = KVTransferConfig(
                kv_connector="KvbmConnector",
                kv_connector_module_path="kvbm.engines.vllm",
                kv_role="kv_both",
                kv_connector_extra_config=extra,
                **({} if policy is None else {"kv_load_failure_policy": policy}),
            )
        self.threads = set(threading.enumerate())
        self.llm: Any = None
        try:
            self.llm = LLM(model=str(model), **{**given, **arguments})
        except BaseException:
            self.close()
            raise
        self.num_free = self.free_blocks

    # -- vLLM's parts ------------------------------------------------------------------------------------------

    @property
    def vllm_scheduler(self) -> Any:
        """The engine's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        """Blocks that the engine can give out."""
        return int(self.vllm_scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    # -- our parts ---------------------------------------------------------------------------------------------

    @property
    def half(self) -> Any:
        """Our `VllmScheduler`."""
        return self.vllm_scheduler.connector._scheduler

    @property
    def worker(self) -> Any:
        """Our `VllmWorker`."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    @property
    def pools(self) -> list[Any]:
        """The pools of all groups."""
        return [pool for group in self.half._groups for pool in group.planner.pools]

    def count(self, counter: str) -> int:
        """Sum a counter of the planners over its keys."""
        return sum(sum(getattr(group.planner.statistics(), counter).values()) for group in self.half._groups)

    # -- requests ----------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Tokens], num_tokens: int = 16, **more: Any) -> tuple[Texts, list[int]]:
        """Give the tokens of each prompt's text, and how many of its own each found cached."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        outs = self.llm.generate([{"prompt_token_ids": one, **more} for one in prompts], greedy, use_tqdm=False)
        return [tuple(out.outputs[0].token_ids) for out in outs], [out.num_cached_tokens for out in outs]

    def settle(self) -> None:
        """Step until no job is open: in this process nobody else does."""
        until = time.monotonic() + QUIET_S
        while self.half.has_work or self.vllm_scheduler.has_requests():
            self.llm.llm_engine.step()
            assert time.monotonic() < until, f"still at work after {QUIET_S} s"

    def forget(self) -> None:
        """Drop the engine's own prefix cache; ours stays."""
        self.settle()
        assert self.llm.reset_prefix_cache(), "blocks are held"

    def forget_memory(self) -> None:
        """Drop the host tier's blocks as well."""
        self.settle()
        for group in self.half._groups:
            group.planner.pools[0].reset()

    def calm(self) -> None:
        """See that neither the engine nor we hold anything."""
        self.settle()
        assert self.free_blocks == self.num_free
        assert self.half._core.num_requests == 0
        assert {} == self.half._requests == self.half._asked == self.half._slots == self.half._due
        for pool in self.pools:
            pool.check()
            status = pool.status()
            assert status.active == status.mutable == status.complete == 0, pool.name

    def close(self) -> None:
        """End the engine; what vLLM keeps for the process goes as well."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()  # where an engine did not start, the next would find its connector
        cleanup_dist_env_and_memory()
        self.llm = None
        gc.collect()

    def own_threads(self) -> list[str]:
        """Name our threads that were started since this engine was and still run."""
        return [one.name for one in threading.enumerate() if one not in self.threads and "kvbm" in one.name]
