"""What the connector takes from vLLM's configuration: our settings, and what it cannot do."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbm.config.sizes import parse_size
from kvbm.engines.vllm.features import feature
from kvbm.errors import ConfigError

_log = logging.getLogger("kvbm.engines")
_SECTIONS = ("host", "disk", "remote", "offload", "runtime")
_OWN: dict[str, tuple[type, str]] = {
    "load_timeout_s": (float, "a number of seconds"),
    "loads": (str, '"async" or "sync"'),
    "by_layer": (bool, "true or false"),
    "always_load": (bool, "true or false"),
    "allow_weak_hashes": (bool, "true or false"),
    "explain": (bool, "true or false"),
    "one_copy": (bool, "true or false"),
}
_LOADS = ("async", "sync")
_SHARED = ("size", "write_budget")  # bytes of the whole engine
_REFUSED = {
    "host.offload_policy": "vLLM's blocks all go to host memory; offload.policy says which go on from there",
    "disk.allocator": "a disk tier takes no memory for its blocks",
    "remote.allocator": "a store takes no memory for its blocks",
    "offload.min_priority": "vLLM's blocks have no priorities",
    "offload.pin_share": "nothing is pinned",
    "offload.prefetch_blocks": "nothing is prefetched",
    "runtime.worker_id": "vLLM's events have no place for it",
    "runtime.rank": "vLLM says it",
    "runtime.num_ranks": "vLLM says it",
    "runtime.backend": "the environment variable KVBM_BACKEND says it",
    "runtime.onboard_timeout_s": "load_timeout_s, beside the sections, says it",
    "runtime.close_timeout_s": "it is always 10 s",
    "runtime.small_copy": "vLLM's scheduler copies nothing itself",
}  # of our configuration, what has no meaning here, and why


def read_settings(extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide ``kv_connector_extra_config`` into sections of our configuration and settings of the connector's own.

    Parameters
    ----------
    extra : mapping
        ``{"host": "20GiB"}`` is short for ``{"host": {"size": "20GiB"}}``, for every tier.

    Raises
    ------
    ConfigError
        A key is unknown, or its value is not of its kind.
    """
    sections: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in extra.items():
        if key in _SECTIONS:
            sections[key] = _section(key, value)
        elif key in _OWN:
            own[key] = _checked(key, value)
        elif key == "copy_thread_blocks":
            sections["device"] = {key: value}  # the one key of the device tier that is not vLLM's to say
        else:
            known = ", ".join((*_SECTIONS, *_OWN, "copy_thread_blocks"))
            raise ConfigError(f"kv_connector_extra_config has no key {key!r}, use {known}")
    _refuse_what_has_no_effect(sections)
    return sections, own


def _section(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return {"size": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"kv_connector_extra_config is no object of sections: {name} is {value!r}, give an object")
    return dict(value)


def _refuse_what_has_no_effect(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse what our configuration has and a connector cannot do: no setting is passed over."""
    where = "kv_connector_extra_config"
    for name, section in sections.items():
        for key, value in section.items():
            reason = _REFUSED.get(f"{name}.{key}")
            if reason is not None:
                raise ConfigError(f"{where}: {name}.{key} has no effect in vLLM, leave it out: {reason}")
            if key in ("policy", "offload_policy") and value == "priority":
                raise ConfigError(f"{where}: {name}.{key} is 'priority', use another: vLLM's blocks have no priorities")
    disk, remote, offload = (sections.get(name, {}) for name in ("disk", "remote", "offload"))
    has_disk = disk.get("size") is not None or disk.get("num_blocks") is not None
    has_remote = remote.get("url") is not None
    if disk and not has_disk:
        raise ConfigError(f"{where}: disk has neither size nor num_blocks: give one, or leave disk out")
    if remote and not has_remote:
        raise ConfigError(f"{where}: remote has no url: give it, or leave remote out")
    if "policy" in offload and not (has_disk or has_remote):
        raise ConfigError(
            f"{where}: offload.policy chooses what goes from host memory to disk or remote, and there is neither: "
            "leave it out"
        )


def _checked(key: str, value: Any) -> Any:
    kind, name = _OWN[key]
    is_right = isinstance(value, (int, float) if kind is float else kind)
    if not is_right or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"kv_connector_extra_config: {key} is {value!r}, need {name}")
    if key == "loads" and value not in _LOADS:
        raise ConfigError(f"kv_connector_extra_config: loads is {value!r}, use {' or '.join(_LOADS)}")
    return value


def need_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse an engine whose blocks, or whose names for them, are not what this connector takes them for.

    Parameters
    ----------
    vllm_config : VllmConfig
    kv_cache_config : KVCacheConfig

    Raises
    ------
    ConfigError
        Layers are on several ranks in turn, the tokens of a block are, or blocks have names of another size; or the
        model has several groups of layers and this vLLM cannot be told of a load that failed.
    """
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name} is {getattr(parallel, name)}, this connector can do with 1 only")
    num_groups = len(kv_cache_config.kv_cache_groups)
    if num_groups > 1 and feature("named failures") is None:
        raise ConfigError(
            f"this model has {num_groups} groups of layers, and this vLLM ends when a block of such a model cannot be "
            "loaded: use vLLM 0.30 or newer, or --disable-hybrid-kv-cache-manager"
        )
    unit = getattr(vllm_config.cache_config, "prefix_match_unit", None)
    sizes = sorted({group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups})
    if unit is not None and sizes != [unit]:
        raise ConfigError(
            f"prefix_match_unit is {unit}, blocks have {sizes} tokens: this connector needs a name for each block, "
            "leave prefix_match_unit out"
        )


def hits_change_text(vllm_config: Any) -> bool:
    """Tell whether this engine writes another text behind a hit, its own or ours.

    Parameters
    ----------
    vllm_config : VllmConfig

    Notes
    -----
    vLLM computes the first tokens of MLA models in another way than those behind cached ones on a CPU without AMX, so
    it turns its own prefix cache off there.
    """
    if vllm_config.cache_config.enable_prefix_caching or not getattr(vllm_config.model_config, "use_mla", False):
        return False
    try:
        from vllm.platforms import current_platform
    except ImportError:  # stand-ins of vLLM
        return False
    return bool(current_platform.is_cpu())


def warn_of_policy(transfer_config: Any) -> None:
    """Say so where a block that cannot be loaded would end a request with an error.

    Parameters
    ----------
    transfer_config : KVTransferConfig
    """
    policy = getattr(transfer_config, "kv_load_failure_policy", "fail")
    if policy != "recompute":
        _log.warning(
            "kv_load_failure_policy is %r: a request whose blocks cannot be loaded ends with an error; "
            'set "kv_load_failure_policy": "recompute" in --kv-transfer-config, and they are computed',
            policy,
        )


def warn_of_random_names(sections: Mapping[str, Any], algorithm: str) -> None:
    """Say so where vLLM names blocks differently in every process, so that none outlives the process that wrote it.

    Parameters
    ----------
    sections : mapping
    algorithm : str
        ``prefix_caching_hash_algo``.

    Notes
    -----
    Before 0.30 vLLM begins its hashes with random bytes, later only those that are not cryptographic.
    """
    if os.environ.get("PYTHONHASHSEED") is not None or not {"disk", "remote"} & sections.keys():
        return
    if feature("fixed names") and not algorithm.startswith("xxhash"):
        return
    _log.warning(
        "this vLLM begins its block hashes (%s) with random bytes: what is on disk or remote is not found again after "
        "a restart; set PYTHONHASHSEED to the same number for every start",
        algorithm,
    )


def part_of(
    sections: Mapping[str, Any],
    *,
    group: int,
    num_groups: int,
    rank: int,
    num_ranks: int,
    is_shared: bool = False,
    makes_folder: bool = True,
) -> dict[str, Any]:
    """Give the settings of one group of layers in one rank.

    Parameters
    ----------
    sections : mapping
        Sizes and the write budget are of all groups and ranks together; numbers of blocks are of each.
    group, num_groups, rank, num_ranks : int
    is_shared : bool
        The ranks share one copy: it has the room of all.
    makes_folder : bool
        For whoever opens the disk tier.
    """
    mine = {name: dict(section) for name, section in sections.items()}
    for section in mine.values():
        for key in _SHARED:
            if key in section and (nbytes := parse_size(section[key])):  # 0 is no budget at all
                section[key] = max(1, nbytes // (num_groups * (1 if is_shared else num_ranks)))
    mine.setdefault("runtime", {}).update({"rank": rank, "num_ranks": num_ranks})
    if "path" in mine.get("disk", {}):
        folder = folder_of(mine["disk"]["path"], group)
        if makes_folder:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine["disk"]["path"] = str(folder)
    return mine


def of_replica(sections: Mapping[str, Any], parallel_config: Any) -> dict[str, Any]:
    """Give each data-parallel replica of an engine a folder of its own: a slab has one owner."""
    mine = {name: dict(section) for name, section in sections.items()}
    if getattr(parallel_config, "data_parallel_size", 1) > 1 and "path" in mine.get("disk", {}):
        mine["disk"]["path"] = str(Path(mine["disk"]["path"]) / f"replica{parallel_config.data_parallel_rank}")
    return mine


def folder_of(path: str, group: int) -> Path:
    """Give where the disk tier of one group of layers lies."""
    return Path(path) / f"group{group}" if group else Path(path)
