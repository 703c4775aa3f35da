"""What names the bytes of a block in a tier that outlives the process: the model, and how this engine lays them out.

Equal texts must mean interchangeable bytes. So whatever changes the bytes is in it: not the files of the model alone,
also what was set over its configuration, the attention kernels, and how they arrange a block inside.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvbm.fingerprint import find_fingerprint

_SAMPLE_NBYTES = 4096
_OF_THIS_PROCESS = secrets.token_bytes(16)
_NUM_ADAPTERS = 256  # whose files are known without reading them again
_YOUNG_NS = 2_000_000_000  # a file may change again within the tick of a file system's clock, its status does not
_PERSON = b"kvbm-adapter-v1"
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


class _File(NamedTuple):
    """What a file's status says of its content: none of it stays when the file is written anew or replaced."""

    name: str
    nbytes: int
    written_ns: int
    changed_ns: int  # cannot be set back, as `written_ns` can
    device: int
    inode: int


def variant_of(lora_request: Any) -> int:
    """Give 64 bits that name an adapter's files; 0 without an adapter.

    Parameters
    ----------
    lora_request : LoRARequest or None

    Notes
    -----
    vLLM's own digests have an adapter's name and path. What lies there may be trained anew, which a tier that outlives
    the process would not notice. Reads a few pages of each file the first time; then it asks for their status only,
    as long as that stays and is older than two seconds. Holds 256 adapters; another one takes the place of the one
    that was asked for the longest time ago.
    """
    if lora_request is None:
        return 0
    folder = _place_of_name(str(lora_request.lora_path), "adapter_config.json")
    files: tuple[_File, ...] = ()
    try:
        files = _files_in(folder)
        is_settled = all(max(one.written_ns, one.changed_ns) + _YOUNG_NS < time.time_ns() for one in files)
        return (_name_of_files if is_settled else _name_of_files.__wrapped__)(folder, files)
    except OSError:  # the engine has its files elsewhere: no other process is to find its blocks
        digest = hashlib.blake2b(repr(files).encode() + _OF_THIS_PROCESS, digest_size=8, person=_PERSON)
        return int.from_bytes(digest.digest(), "little")


def _files_in(folder: str) -> tuple[_File, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(_file(one.name, one.stat()) for one in entries if one.is_file()))


def _file(name: str, status: os.stat_result) -> _File:
    return _File(name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino)


@functools.lru_cache(maxsize=_NUM_ADAPTERS)
def _name_of_files(folder: str, files: tuple[_File, ...]) -> int:
    """Name files by a few pages of each; raises OSError, and so keeps nothing, where one is no longer what it was."""
    digest = hashlib.blake2b(digest_size=8, person=_PERSON)
    for one in files:
        digest.update(repr((one.name, one.nbytes, one.written_ns)).encode())
        with Path(folder, one.name).open("rb", buffering=0) as file:
            for place in (0, one.nbytes // 2, max(0, one.nbytes - _SAMPLE_NBYTES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE_NBYTES))
            if _file(one.name, os.fstat(file.fileno())) != one:
                raise OSError(f"{one.name} was replaced while it was read")
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
