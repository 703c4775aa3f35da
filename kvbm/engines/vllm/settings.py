"""What the connector takes from vLLM's configuration: our settings, and what names the bytes of a block."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbm.errors import ConfigError
from kvbm.fingerprint import find_fingerprint

_log = logging.getLogger("kvbm.engines")
_SECTIONS = ("host", "disk", "remote", "offload", "runtime")
_OWN = ("load_timeout_s", "allow_weak_hashes")


def read_settings(extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide ``kv_connector_extra_config`` into sections of our configuration and settings of the connector's own.

    Parameters
    ----------
    extra : mapping
        ``{"host": "20GiB"}`` is short for ``{"host": {"size": "20GiB"}}``, for every tier.

    Raises
    ------
    ConfigError
        A key is unknown.
    """
    sections: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in extra.items():
        if key in _SECTIONS:
            sections[key] = {"size": value} if isinstance(value, (str, int)) else dict(value)
        elif key in _OWN:
            own[key] = value
        else:
            known = ", ".join((*_SECTIONS, *_OWN))
            raise ConfigError(f"kv_connector_extra_config has no key {key!r}, use {known}")
    return sections, own


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


def in_folder(sections: Mapping[str, Any], group: int, rank: int, num_ranks: int) -> dict[str, Any]:
    """Give the settings of one group in one rank: a part of the sizes, a folder of its own on the disk."""
    mine = {name: dict(section) for name, section in sections.items()}
    mine.setdefault("runtime", {}).update({"rank": rank, "num_ranks": num_ranks})
    if "path" in mine.get("disk", {}) and group:
        folder = Path(mine["disk"]["path"]) / f"group{group}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine["disk"]["path"] = str(folder)
    return mine


def fingerprint_of(vllm_config: Any, kernel: str) -> str:
    """Say which model computed the bytes of a block, and how this engine lays them out inside.

    Parameters
    ----------
    vllm_config : VllmConfig
    kernel : str
        The attention backend, where it decides what is in a block.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parts = [
        find_fingerprint(str(model.model)),
        f"revision={model.revision or ''}",
        f"dtype={model.dtype}",
        f"quantisation={model.quantization or ''}",
        f"cache_dtype={cache.cache_dtype}",
        f"tokens={cache.block_size}",
        f"hash={cache.prefix_caching_hash_algo}",
        f"kernel={kernel}",
    ]
    return ",".join(parts)
