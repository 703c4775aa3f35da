"""What names the bytes of a block in a tier that outlives the process: the model, and how this engine lays them out.

Equal texts must mean interchangeable bytes. So whatever changes the bytes is in it: not the files of the model alone,
also what was set over its configuration, the attention kernels, and how they arrange a block inside.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbm.fingerprint import find_fingerprint

_SAMPLE_NBYTES = 4096
_OF_THIS_PROCESS = secrets.token_bytes(16)
_NOT_OF_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version")


def fingerprint_of(vllm_config: Any, kernel: str) -> str:
    """Say which model computed the bytes of a block, and how this engine lays them out inside.

    Parameters
    ----------
    vllm_config : VllmConfig
    kernel : str
        As `kernel_of` gives it.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parts = [
        find_fingerprint(_place_of(vllm_config)),
        f"revision={model.revision or ''}",
        f"config={_config_digest(getattr(model, 'hf_config', None))}",
        f"dtype={model.dtype}",
        f"quantisation={model.quantization or ''}",
        f"cache_dtype={cache.cache_dtype}",
        f"tokens={cache.block_size}",
        f"hash={cache.prefix_caching_hash_algo}",
        f"kernel={kernel}",
    ]
    if (is_long := _is_long_rope(model)) is not None:
        parts.append(f"long_rope={is_long}")
    if getattr(cache, "calculate_kv_scales", False):
        parts.append(f"scales={secrets.token_hex(8)}")  # from the first prompt of each process
    return ",".join(parts)


def kernel_of(vllm_config: Any, names: Sequence[str], kv_caches: Mapping[str, Any], spec: Any) -> str:
    """Say how a group's attention kernels arrange what is in a block.

    Parameters
    ----------
    vllm_config : VllmConfig
    names : sequence of str
        Of the group's layers.
    kv_caches : mapping
        Tensors by name.
    spec : KVCacheSpec

    Notes
    -----
    On the CPU vLLM packs keys for the instructions that the machine has: two machines may differ.
    """
    compilation = getattr(vllm_config, "compilation_config", None)
    layers = getattr(compilation, "static_forward_context", {})
    kernels, insides = set(), set()
    for name in names:
        if name not in kv_caches:
            continue
        layer, tensor = layers.get(name), kv_caches[name]
        backend = getattr(layer, "attn_backend", None)
        kernels.add((getattr(backend, "__name__", ""), str(getattr(layer, "isa", ""))))
        insides.add((str(tensor.dtype), tuple(tensor.shape[1:]), tuple(tensor.stride()[1:])))
    digest = hashlib.blake2b(repr((sorted(kernels), sorted(insides))).encode(), digest_size=8).hexdigest()
    return f"{type(spec).__name__}-{digest}"


def variant_of(lora_request: Any) -> int:
    """Give 64 bits that name an adapter's files; 0 without an adapter.

    Parameters
    ----------
    lora_request : LoRARequest or None

    Notes
    -----
    vLLM's own digests have an adapter's name and path. What lies there may be trained anew, which a tier that outlives
    the process would not notice. Reads a few pages of each file: once for a request is often enough.
    """
    if lora_request is None:
        return 0
    folder = Path(_place_of_name(str(lora_request.lora_path), "adapter_config.json"))
    digest = hashlib.blake2b(digest_size=8, person=b"kvbm-adapter-v1")
    try:
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            status = path.stat()
            digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
            with path.open("rb", buffering=0) as file:
                for place in (0, status.st_size // 2, max(0, status.st_size - _SAMPLE_NBYTES)):
                    file.seek(place)
                    digest.update(file.read(_SAMPLE_NBYTES))
    except OSError:  # the engine has its files elsewhere: no other process is to find its blocks
        digest.update(_OF_THIS_PROCESS)
    return int.from_bytes(digest.digest(), "little")


def _place_of(vllm_config: Any) -> str:
    """Give the folder of a model's files; its name where there is none: a name alone outlives changed weights."""
    model = vllm_config.model_config
    folder = getattr(getattr(vllm_config, "load_config", None), "download_dir", None)
    return _place_of_name(str(model.model), "config.json", folder=folder, revision=model.revision)


def _place_of_name(name: str, file: str, *, folder: str | None = None, revision: str | None = None) -> str:
    if Path(name).exists():
        return name
    try:
        find = importlib.import_module("huggingface_hub").try_to_load_from_cache
        found = find(name, file, cache_dir=folder, revision=revision)
    except Exception:  # no such package, or nothing that it takes for a name
        return name
    return str(Path(found).parent) if isinstance(found, str) else name


def _config_digest(config: Any) -> str:
    """Give a digest of a model's configuration as the engine uses it, what was set over it included."""
    if not hasattr(config, "to_dict"):
        return ""
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _is_long_rope(model: Any) -> bool | None:
    """Whether vLLM turns keys by a model's factors for long texts, all of them by `max_model_len`; None: no factors."""
    config = getattr(model, "hf_text_config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, Mapping) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    short = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", 0))
    return bool(model.max_model_len > (short or 0))
