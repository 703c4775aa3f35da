"""Config: the root of the tree, what holds between its sections, and the ways to read and write it.

A lower tier (host, disk) turns offload on. The tree is read by the manager, the command and the engines; below them
settings are plain arguments. Nothing here changes after it is made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvbm.config import loading
from kvbm.config.fields import check_value, fields_of, key, refused, sections_of, show
from kvbm.config.sections import (
    MAX_BLOCKS,
    REMOTE_BLOCKS,
    DeviceConfig,
    DiskConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
    RemoteConfig,
    RuntimeConfig,
    TierConfig,
)
from kvbm.types import Tier

_log = logging.getLogger("kvbm.config")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a manager can be told.

    Raises
    ------
    ConfigError
        A value is impossible, or two disagree; the message names the key's path and what is allowed.

    Notes
    -----
    A lower tier that has fewer blocks than the one above is logged once for each Config, as a warning: lower tiers hold
    copies of what is above, so they must grow to be of use.

    Examples
    --------
    >>> config = Config.from_dict({"model": {"num_layers": 2, "inner_dim": 64}, "host": {"size": "1MiB"}})
    >>> config.is_offload_enabled, config.num_blocks_of("host", config.model.block_nbytes)
    (True, 32)
    """

    model: Annotated[ModelConfig, Meta(description="Shape and identity of the model's KV cache.")]
    runtime: Annotated[RuntimeConfig, Meta(description="Threads and deadlines.")] = msgspec.field(
        default_factory=RuntimeConfig
    )
    device: Annotated[DeviceConfig, Meta(description="Device tier, G1.")] = msgspec.field(default_factory=DeviceConfig)
    host: Annotated[HostConfig, Meta(description="Host memory tier, G2.")] = msgspec.field(default_factory=HostConfig)
    disk: Annotated[DiskConfig, Meta(description="Disk tier, G3.")] = msgspec.field(default_factory=DiskConfig)
    remote: Annotated[RemoteConfig, Meta(description="Object store tier, G4.")] = msgspec.field(
        default_factory=RemoteConfig
    )
    offload: Annotated[OffloadConfig, Meta(description="What goes down, and its limits.")] = msgspec.field(
        default_factory=OffloadConfig
    )
    enable_offload: Annotated[
        bool | None,
        key(
            "Whether blocks are copied to lower tiers; left out, a lower tier turns it on; a value that does not fit "
            "the tiers is refused.",
            "true, false, or leave it out",
        ),
    ] = None

    def __post_init__(self) -> None:
        for name, kind in sections_of(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise refused(f"{name} is {show(value)}, give a {kind.__name__}", name)
        check_value("enable_offload", fields_of(type(self))["enable_offload"], self.enable_offload)
        self._check_offload()
        self._check_sizes()

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def is_offload_enabled(self) -> bool:
        """Whether there is a lower tier to offload to."""
        return self.host.is_present or self.disk.is_present or self.remote.is_present

    def tier(self, tier: Tier | str) -> TierConfig:
        """Give the section of a tier: "device", "host", "disk" or "remote"."""
        name = str(getattr(tier, "value", tier))
        if name not in ("device", "host", "disk", "remote"):
            raise refused(f"there is no tier {show(name)} in the configuration, give device, host, disk or remote")
        found: TierConfig = getattr(self, name)
        return found

    def num_blocks_of(self, tier: Tier | str, block_nbytes: int, *, reserved_nbytes: int = 0) -> int:
        """Count the blocks of a tier.

        Parameters
        ----------
        tier : Tier or str
            "device", "host", "disk" or "remote".
        block_nbytes : int
            Bytes of one block in the tier's layout, padding included.
        reserved_nbytes : int
            Bytes of `size` that are no blocks.

        Returns
        -------
        int
            `num_blocks`, or as many whole blocks as fit into `size`; 0 where the tier is absent. For the remote tier
            as many as are remembered.

        Raises
        ------
        ConfigError
            Not one block fits, or more than a pool can hold.
        """
        config = self.tier(tier)
        if config.num_blocks is not None:
            return config.num_blocks
        if config is self.remote and config.is_present:
            return REMOTE_BLOCKS
        if config.nbytes is None:
            return 0
        num_blocks, path = (config.nbytes - reserved_nbytes) // block_nbytes, f"{config.section}.size"
        if num_blocks < 1:
            needed = block_nbytes + reserved_nbytes
            raise refused(
                f"{path} is {config.nbytes} bytes and one block takes {needed}: give at least that, or leave the tier "
                "out",
                path,
            )
        if num_blocks > MAX_BLOCKS:
            raise refused(
                f"{path} makes {num_blocks} blocks of {block_nbytes} bytes, give room for at most {MAX_BLOCKS}", path
            )
        return num_blocks

    # -- loading and writing: see `kvbm.config.loading` ----------------------------------------------------------

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Config:
        """Read nested mappings: ``{"model": {"num_layers": 32, ...}, "host": {"size": "8GiB"}}``."""
        return loading.build(cls, [loading.read_mapping(cls, mapping)])[0]

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Config:
        """Read a TOML file, a table a section; messages name the file."""
        return loading.build(cls, [loading.read_toml(cls, path)])[0]

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read the environment only: ``KVBM_<SECTION>__<KEY>``; messages name the variable.

        The default for `environ` is this process's.
        """
        return loading.build(cls, [loading.read_environment(cls, os.environ if environ is None else environ)])[0]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Read a TOML file, then the environment, then overrides; the later one wins, key by key.

        Parameters
        ----------
        path : path, optional
            The file; default by ``KVBM_CONFIG``, or none.
        overrides : mapping, optional
            As `from_dict` takes it, but partial.
        environ : mapping, optional
            Default: this process's environment.

        Raises
        ------
        ConfigError
            A key is unknown or a value impossible; the message says which source it came from.

        Notes
        -----
        `num_blocks` and `size` of a tier are one choice: the later source that gives either replaces both.
        """
        return cls.load_with_sources(path, overrides, environ)[0]

    @classmethod
    def load_with_sources(
        cls,
        path: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> tuple[Config, dict[str, str]]:
        """Load as `load` does, and tell where each key that is not a default came from, by its path."""
        environ = os.environ if environ is None else environ
        path = path if path is not None else environ.get("KVBM_CONFIG") or None
        sources = [] if path is None else [loading.read_toml(cls, path)]
        sources.append(loading.read_environment(cls, environ))
        if overrides is not None:
            sources.append(loading.read_mapping(cls, overrides, origin="overrides"))
        return loading.build(cls, sources)

    def to_dict(self) -> dict[str, Any]:
        """Give plain nested dicts that `from_dict` reads back to an equal Config; sizes are in bytes."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values

    def to_toml(self, sources: Mapping[str, str] | None = None) -> str:
        """Write text that `from_toml` reads back to an equal Config.

        Parameters
        ----------
        sources : mapping, optional
            Of `load_with_sources`: then each key has a comment that says where it came from, and keys that have no
            value are listed as comments.
        """
        from kvbm.config import toml  # most managers read settings only

        return toml.write(type(self), self.to_dict(), sources)

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """Give the JSON schema (draft 2020-12) of what `from_dict` and `from_toml` read."""
        from kvbm.config import schema  # for readers of the documentation

        return schema.make(cls)

    # -- private -----------------------------------------------------------------------------------------------

    def _check_offload(self) -> None:
        lower = [tier.section for tier in (self.host, self.disk, self.remote) if tier.is_present]
        if self.enable_offload is False and lower:
            keys = [f"{section}.{name}" for section in lower for name in ("num_blocks", "size")]
            given = "remote.url" if lower[0] == "remote" else f"{lower[0]}.num_blocks and {lower[0]}.size"
            raise refused(
                f"enable_offload is false and there is a {lower[0]} tier: leave {given} out, or leave enable_offload "
                "out",
                *("enable_offload", *keys),
            )
        if self.enable_offload and not lower:
            raise refused(
                "enable_offload is true and there is no lower tier: give host.num_blocks or host.size, disk.path with "
                "disk.num_blocks or disk.size, or remote.url",
                "enable_offload",
            )

    def _check_sizes(self) -> None:
        above: tuple[str, int] | None = None
        for section in ("device", "host", "disk"):
            num_blocks = self.num_blocks_of(section, self.model.block_nbytes)
            if above is not None and 0 < num_blocks < above[1]:
                _log.warning(
                    "tier=%s blocks=%d is smaller than tier=%s blocks=%d: a lower tier holds copies of the one above, "
                    "give it more blocks",
                    *(section, num_blocks, *above),
                )
            above = (section, num_blocks) if num_blocks else above
