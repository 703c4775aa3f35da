"""What the operator is going to give the engine, read as the connector reads it, and as a run with little room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.config.sections import DiskConfig, HostConfig, RemoteConfig, TierConfig
from kvbm.config.sizes import parse_size
from kvbm.engines.doctor.findings import Finding, State
from kvbm.engines.vllm.settings import read_settings
from kvbm.errors import ConfigError

NAME, MODULE = "KvbmConnector", "kvbm.engines.vllm"
GOLDEN_BLOCKS = 16  # of each tier of the run with little room
_KINDS: dict[str, type[TierConfig]] = {"host": HostConfig, "disk": DiskConfig, "remote": RemoteConfig}


@dataclass(frozen=True)
class Setup:
    """Settings of the connector, and of the engine as far as they matter here.

    Attributes
    ----------
    transfer : dict
        What ``--kv-transfer-config`` holds.
    sections : dict of str to dict
        Sections of our configuration.
    tiers : dict of str to TierConfig
        Those that are asked for: host, disk, remote.
    engine : dict
        Further arguments of the engine.
    model : str
        Empty: a tiny one is made.
    device_nbytes : int, optional
        Of the engine's own KV memory on one rank; None where the operator has not said.
    has_one_copy : bool
        Every rank's blocks hold the same bytes, and the ranks share their tiers.
    """

    transfer: dict[str, Any]
    sections: dict[str, dict[str, Any]]
    tiers: dict[str, TierConfig]
    engine: dict[str, Any]
    model: str = ""
    device_nbytes: int | None = None
    has_one_copy: bool = False

    @property
    def num_ranks(self) -> int:
        """Workers that share the model's heads."""
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def num_parts(self) -> int:
        """Parts of a block that differ: one on each rank, which has tiers of its own, or one for all of them."""
        return 1 if self.has_one_copy else self.num_ranks

    @property
    def disk_path(self) -> Path | None:
        """Directory of the disk tier."""
        disk = self.tiers.get("disk")
        return Path(disk.path) if isinstance(disk, DiskConfig) and disk.path is not None else None

    def nbytes_of(self, tier: str, *, block_nbytes: int = 0, num_groups: int = 1) -> int | None:
        """Give the bytes of a tier, of all ranks and groups of layers together; None where that cannot be told."""
        section = self.tiers.get(tier)
        if section is None:
            return None
        if section.nbytes is not None:
            return section.nbytes
        nbytes = section.num_blocks * block_nbytes if section.num_blocks else 0
        return nbytes * num_groups * self.num_parts or None

    def golden_extra(self, folder: str, prefix: str) -> dict[str, Any]:
        """Give the same ``kv_connector_extra_config`` with little room, at a place of its own, a copy on every rank.

        Parameters
        ----------
        folder : str
            For the slabs; on the same disk.
        prefix : str
            In the object store, behind the operator's own.
        """
        extra = dict(self.transfer.get("kv_connector_extra_config") or {})
        for name in _KINDS:
            section = dict(self.sections.get(name, {}))
            if name not in self.tiers:
                extra.pop(name, None)
                continue
            section.pop("size", None)
            section["num_blocks"] = GOLDEN_BLOCKS
            if name == "disk":
                section.pop("slab", None)
                section.update({"path": folder, "write_budget": 0})
            if name == "remote":
                section["prefix"] = "/".join(part for part in (section.get("prefix", "kvbm"), prefix) if part)
            extra[name] = section
        extra["one_copy"] = False  # each rank's memory is examined by itself
        return extra


def read_transfer(text: str) -> dict[str, Any]:
    """Read ``--kv-transfer-config``: JSON, or @ and the name of a file that holds it.

    Our part of a ``MultiConnector`` is read as if it stood alone.

    Raises
    ------
    ConfigError
        The file cannot be read, it is no JSON object, or a MultiConnector has not one connector of ours.
    """
    given = read_object("--kv-transfer-config", text)
    extra = given.get("kv_connector_extra_config")
    children = extra.get("connectors") if isinstance(extra, dict) else None
    if given.get("kv_connector") != "MultiConnector" or not isinstance(children, list):
        return given
    ours = [one for one in children if isinstance(one, dict) and one.get("kv_connector") == NAME]
    if len(ours) != 1:
        raise ConfigError(f"the MultiConnector has {len(ours)} connectors of the name {NAME}, give it one")
    policy = {name: given[name] for name in ("kv_load_failure_policy",) if name in given}  # vLLM reads the outer one
    return {**ours[0], **policy}


def read_object(option: str, text: str) -> dict[str, Any]:
    """Read an option that is a JSON object, or @ and the name of a file that holds one.

    Raises
    ------
    ConfigError
        The file cannot be read, or it holds something else.
    """
    source = text
    if text.startswith("@"):
        source = f"the file {text[1:]}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option}: {source} cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} {source} is no JSON ({error}): quote it for the shell, or give @FILE") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{option} {source} is no JSON object: give {{...}}")
    return value


def make_transfer(host: str | None, disk: str | None, disk_path: Path | None, remote: str | None) -> dict[str, Any]:
    """Make what ``--kv-transfer-config`` should hold for these tiers.

    Raises
    ------
    ConfigError
        There is no host tier, or a disk tier is given by half.
    """
    if host is None:
        raise ConfigError("the doctor needs the tiers: give --kv-transfer-config as the engine gets it, or --host SIZE")
    if (disk is None) != (disk_path is None):
        raise ConfigError("a disk tier has a size and a place: give both --disk SIZE and --disk-path DIR, or neither")
    extra: dict[str, Any] = {"host": host}
    if disk is not None:
        extra["disk"] = {"path": str(disk_path), "size": disk}
    if remote is not None:
        extra["remote"] = {"url": remote}
    return {
        "kv_connector": NAME,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def make_setup(
    transfer: Mapping[str, Any], *, engine: Mapping[str, Any], model: str = "", device_nbytes: int | None = None
) -> Setup:
    """Read the connector's settings as the connector does.

    Raises
    ------
    ConfigError
        A key is unknown or a value impossible: the engine would not start.
    """
    extra = transfer.get("kv_connector_extra_config") or {}
    if not isinstance(extra, Mapping):
        raise ConfigError(f"kv_connector_extra_config is {extra!r}, give an object of settings")
    try:
        sections, _ = read_settings(extra)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"kv_connector_extra_config is no object of sections ({error}), got {dict(extra)}") from error
    tiers: dict[str, TierConfig] = {}
    for name, kind in _KINDS.items():
        try:
            section = kind(**sections.get(name, {}))
        except TypeError as error:
            raise ConfigError(f"{name}: {error}, use {', '.join(kind.__struct_fields__)}") from error
        if section.is_present:
            tiers[name] = section
    if device_nbytes is None and engine.get("kv_cache_memory_bytes"):
        device_nbytes = parse_size(engine["kv_cache_memory_bytes"])
    return Setup(dict(transfer), sections, tiers, dict(engine), model, device_nbytes)


def check_transfer(setup: Setup) -> list[Finding]:
    """Look at what the engine is told beside the tiers: which connector, its role, and what a failed load means."""
    given = setup.transfer
    found = []
    wrong = [
        f"{key} is {given.get(key)!r}, give {value!r}"
        for key, value in (("kv_connector", NAME), ("kv_connector_module_path", MODULE))
        if given.get(key) != value
    ]
    role = given.get("kv_role")
    if wrong:
        found.append(Finding("connector", State.UNSAFE, "; ".join(wrong), "the engine would not load this connector"))
    elif role != "kv_both":
        advice = 'set "kv_role": "kv_both": a cache is both written and read'
        found.append(Finding("connector", State.WARNING, f"kv_role is {role!r}", advice))
    else:
        found.append(Finding("connector", State.OK, f"{NAME} of {MODULE}, {role}"))
    if "host" not in setup.tiers:
        text = "there is no host tier, the connector needs one"
        found.append(Finding("host tier", State.UNSAFE, text, 'give it memory, as {"host": "20GiB"}'))
    policy = given.get("kv_load_failure_policy", "fail")
    if policy == "recompute":
        found.append(Finding("kv_load_failure_policy", State.OK, "recompute: what cannot be loaded is computed"))
    else:
        found.append(
            Finding(
                "kv_load_failure_policy",
                State.WARNING,
                f"{policy}: a request whose blocks cannot be loaded ends with an error",
                'set "kv_load_failure_policy": "recompute" in --kv-transfer-config',
            )
        )
    if setup.sections.get("offload", {}).get("verify_checksums") is False:
        text = "offload.verify_checksums is false: a wrong byte would be served"
        found.append(Finding("checksums", State.WARNING, text, "leave it out, or set it to true"))
    return found
