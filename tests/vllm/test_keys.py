"""What vLLM's own hashes tell apart is apart in our tiers: adapters and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_site import Engine, needs_vllm, prompt_of

pytestmark = needs_vllm
Start = Callable[..., Engine]
PROMPTS = [prompt_of(80 + seed, num_tokens) for seed, num_tokens in enumerate((300, 500))]
WHOLE = [256, 448]


def make_adapter(folder: Path, seed: int) -> Path:
    """Write a LoRA adapter with random weights, large enough to change the text."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    rank, hidden, values = 8, 128, 64
    weights = {}
    for layer in range(4):
        for name, width in (("q_proj", hidden), ("v_proj", values)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(rank, hidden, generator=generator)
            weights[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(width, rank, generator=generator)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_blocks_of_one_adapter_are_not_taken_for_those_of_another(start: Start, tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [None, *(LoRARequest(f"a{i}", i, str(make_adapter(tmp_path / f"a{i}", i))) for i in (1, 2))]
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

    def generate(engine: Engine, adapter: Any) -> tuple[list[tuple[int, ...]], list[int]]:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outs = engine.llm.generate(prompts, greedy, use_tqdm=False, lora_request=adapter)
        return [tuple(out.outputs[0].token_ids) for out in outs], [out.num_cached_tokens for out in outs]

    loras = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    engine = start(has_connector=False, **loras)
    texts = [generate(engine, adapter)[0] for adapter in adapters]
    assert len({tuple(text) for text in texts}) == 3, "the adapters change no text"
    engine = start(**loras)
    for adapter, text in zip(adapters, texts, strict=True):
        assert generate(engine, adapter) == (text, [0, 0]), "others' blocks were found"
        engine.forget()
    for adapter, text in zip(adapters, texts, strict=True):
        assert generate(engine, adapter) == (text, WHOLE)
        engine.forget()
    engine.calm()


def test_blocks_behind_one_picture_are_not_taken_for_those_behind_another(start: Start) -> None:
    """The tiny models see no pictures, so this asks our half about requests as vLLM hashes them."""
    from vllm import SamplingParams
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.request import Request

    engine = start()
    hasher = engine.llm.llm_engine.engine_core.engine_core.request_block_hasher
    prompt = prompt_of(90, 300)
    engine.generate([prompt])
    engine.forget()

    def matched(picture: str | None) -> int:
        features = [
            MultiModalFeatureSpec(
                data=None, modality="image", identifier=name, mm_position=PlaceholderRange(offset=70, length=20)
            )
            for name in ([] if picture is None else [picture])
        ]
        request = Request(
            request_id=f"asks-{picture}",
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=1),
            pooling_params=None,
            mm_features=features,
            block_hasher=hasher,
        )
        found, _ = engine.half.matched_tokens(request, 0)
        engine.half.finished(request)
        return found

    assert matched(None) == 256
    assert matched("a" * 64) == matched("b" * 64) == 64, "the block before the picture is the same"
    engine.calm()
