"""Settings: one tree of frozen Structs, from a dict, a TOML file or the environment, checked when it is made.

`Config` holds a section for the runtime, the model, each tier and the offload. Everything impossible is refused with
`kvbm.errors.ConfigError`, which names the key's path, what is allowed, and the source it came from.
"""

from kvbm.config.sections import (
    BACKENDS,
    LAYOUTS,
    DeviceConfig,
    DiskConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
    RemoteConfig,
    RuntimeConfig,
    TierConfig,
)
from kvbm.config.sizes import parse_size
from kvbm.config.tree import Config

__all__ = [
    "BACKENDS",
    "LAYOUTS",
    "Config",
    "DeviceConfig",
    "DiskConfig",
    "HostConfig",
    "ModelConfig",
    "OffloadConfig",
    "RemoteConfig",
    "RuntimeConfig",
    "TierConfig",
    "parse_size",
]
