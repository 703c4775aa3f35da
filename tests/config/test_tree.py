"""The tree of settings: what it allows, what it refuses and how it says so."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvbm import BlockManager
from kvbm._backend import load_backend
from kvbm.config import (
    BACKENDS,
    LAYOUTS,
    Config,
    DeviceConfig,
    DiskConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
    RuntimeConfig,
    parse_size,
)
from kvbm.config.fields import OWN_NAMES
from kvbm.errors import ConfigError
from kvbm.plugins import plugin_names
from kvbm.types import Tier

MODEL = ModelConfig(num_layers=2, inner_dim=64)  # blocks of 32 KiB
BLOCK = 32768


def test_defaults_are_those_of_the_requirements() -> None:
    config = Config(model=MODEL)
    assert (config.model.block_size, config.model.page_size, config.model.outer_dim) == (64, 64, 2)
    assert (config.device.gpu_memory_fraction, config.offload.policy, config.runtime.worker_id) == (0.9, "always", "0")
    assert (config.is_offload_enabled, config.enable_offload) == (False, None)
    assert MODEL.block_nbytes == BLOCK


@pytest.mark.parametrize("kind", ["eviction", "offload"])
def test_own_names_are_those_of_the_plug_ins(kind: str) -> None:
    assert set(OWN_NAMES[kind]) <= set(plugin_names(kind))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_manager_takes_every_layout(layout: str) -> None:
    with BlockManager(config=Config(model=MODEL, device=DeviceConfig(num_blocks=1, layout=layout))) as manager:
        assert manager.device.total_blocks == 1


@pytest.mark.parametrize("choice", BACKENDS)
def test_every_backend_is_one_that_can_be_asked_for(choice: str) -> None:
    if choice == "native":
        pytest.importorskip("kvbm._native.store", reason="the pure package has one twin only")
    assert load_backend(choice).name in BACKENDS


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DiskConfig, {"num_blocks": -1}, "disk.num_blocks is -1, give 1 or more, or leave the tier out"),
        (HostConfig, {"num_blocks": 0}, "host.num_blocks is 0, give 1 or more, or leave the tier out"),
        (HostConfig, {"num_blocks": 2**31 - 1}, "host.num_blocks is 2147483647, give at most 2147483646"),
        (HostConfig, {"num_blocks": True}, "host.num_blocks is true, give 1 or more, or leave the tier out"),
        (HostConfig, {"num_blocks": 4.0}, "host.num_blocks is 4.0, give 1 or more, or leave the tier out"),
        (
            HostConfig,
            {"num_blocks": 4, "size": "1MiB"},
            "host.num_blocks is 4 and host.size is 1048576, give only one of them",
        ),
        (
            HostConfig,
            {"size": "8G"},
            'host.size is \'8G\', give bytes, or a size such as "8GiB", "512 MiB" or "1.5TB", or leave the tier out',
        ),
        (
            HostConfig,
            {"size": "0 B"},
            'host.size is 0, give bytes, or a size such as "8GiB", "512 MiB" or "1.5TB", or leave the tier out',
        ),
        (
            HostConfig,
            {"layout": "outer_first"},
            "host.layout is 'outer_first', give one of "
            "fully_contiguous, layer_separate_block_first, layer_separate_outer_first, or install a plug-in of the "
            "group kvbm.layout",
        ),
        (
            HostConfig,
            {"eviction": "LRU"},
            "host.eviction is 'LRU', did you mean lru? give one of fifo, lru, or install a plug-in of the group "
            "kvbm.eviction",
        ),
        (HostConfig, {"huge_pages": 1}, "host.huge_pages is 1, give true or false"),
        (
            DeviceConfig,
            {"gpu_memory_fraction": 0},
            "device.gpu_memory_fraction is 0, give a share, more than 0 and at ",
        ),
        (DeviceConfig, {"gpu_memory_fraction": 1.01}, "device.gpu_memory_fraction is 1.01, give a share"),
        (DeviceConfig, {"gpu_memory_fraction": float("nan")}, "device.gpu_memory_fraction is nan, give a share"),
        (DeviceConfig, {"copy_thread_blocks": -1}, "device.copy_thread_blocks is -1, give 0 to 65535"),
        (DeviceConfig, {"copy_thread_blocks": 65536}, "device.copy_thread_blocks is 65536, give 0 to 65535"),
        (DeviceConfig, {"copy_thread_blocks": "few"}, "device.copy_thread_blocks is 'few', give 0 to 65535"),
        (DiskConfig, {"path": ""}, "disk.path is '', give a directory"),
        (DiskConfig, {"path": "a\0b"}, "disk.path is 'a\\x00b', give text without NUL characters"),
        (DiskConfig, {"path": "\ud800"}, "disk.path is '\\ud800', give text that UTF-8 can hold"),
        (
            DiskConfig,
            {"num_blocks": 4},
            "disk.path is not given, a disk tier needs the directory that holds its blocks: give disk.path (or "
            "offload_path), or leave disk.num_blocks and disk.size out",
        ),
        (RuntimeConfig, {"onboard_timeout_s": float("inf")}, "runtime.onboard_timeout_s is inf, give seconds, more "),
        (RuntimeConfig, {"close_timeout_s": 0}, "runtime.close_timeout_s is 0, give seconds, more than 0"),
        (RuntimeConfig, {"close_timeout_s": 10**400}, "runtime.close_timeout_s is 1000000"),
        (RuntimeConfig, {"backend": "cuda"}, "runtime.backend is 'cuda', give one of auto, native, pure"),
        (RuntimeConfig, {"worker_id": 0}, "runtime.worker_id is 0, give text that is not empty"),
        (RuntimeConfig, {"copy_threads": -1}, "runtime.copy_threads is -1, give 0 or more"),
        (RuntimeConfig, {"small_copy": "many"}, "runtime.small_copy is 'many', give bytes, or a size such as"),
        (OffloadConfig, {"min_priority": 101}, "offload.min_priority is 101, give 0 to 100"),
        (OffloadConfig, {"in_flight_share": 0.0}, "offload.in_flight_share is 0.0, give a share"),
        (OffloadConfig, {"policy": "second-use"}, "offload.policy is 'second-use', did you mean second_use? give one "),
        (
            ModelConfig,
            {"num_layers": 10**5000, "inner_dim": 8},
            "model.num_layers is an unprintable int, give at most 9223372036854775807",
        ),
        (
            ModelConfig,
            {"num_layers": 1, "inner_dim": 8, "weights_epoch": -(10**5000)},
            "model.weights_epoch is an unprintable int, give a 64-bit integer or text",
        ),
        (ModelConfig, {"num_layers": 0, "inner_dim": 8}, "model.num_layers is 0, give 1 or more"),
        (ModelConfig, {"num_layers": 1, "inner_dim": None}, "model.inner_dim is not given, give 1 or more"),
        (
            ModelConfig,
            {"num_layers": 1, "inner_dim": 8, "dtype": "flot16"},
            "model.dtype is 'flot16', did you mean float16?",
        ),
        (
            ModelConfig,
            {"num_layers": 1, "inner_dim": 8, "num_heads": 3},
            "model.inner_dim is 8, give a multiple of model.num_heads (3)",
        ),
    ],
)
def test_section_refuses_what_is_impossible(section: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        section(**values)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("count", [1, 2, 2**31 - 3, 2**31 - 2])
def test_section_takes_every_count_within_the_limits(count: int) -> None:
    assert HostConfig(num_blocks=count).num_blocks == count


def test_section_takes_numpy_integers_and_paths() -> None:
    disk = DiskConfig(num_blocks=np.int64(4), path=Path("/kv"))  # type: ignore[arg-type]
    assert (disk.num_blocks, disk.path) == (4, "/kv")
    assert type(disk.num_blocks) is int


def test_sizes_are_kept_in_bytes() -> None:
    assert HostConfig(size="1.5GiB").nbytes == HostConfig(size=3 << 29).nbytes == 3 << 29
    assert HostConfig(size="1GiB") == HostConfig(size=1 << 30)
    assert (RuntimeConfig(small_copy="2 kB").small_copy_nbytes, RuntimeConfig(small_copy=0).small_copy_nbytes) == (
        2000,
        0,
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *(("0", 0), ("7", 7), ("7B", 7), (" 1 kB ", 1000), ("1KiB", 1024), ("512 MiB", 512 << 20), ("8GB", 8 * 10**9)),
        *(("8gib", 8 << 30), ("1.5TiB", 3 << 39), ("1.0001kB", 1000), ("1EiB", 1 << 60), (5, 5)),
    ],
)
def test_size_is_read(text: int | str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "8G", "8Gi", "-1", "-1GiB", "1 2", "1e3", "iB", "8iB", "1.GiB", ".5GiB", "8GiBs", "८GiB", "8GiB\n"),
        *(-1, True, 1.5, None, "9" * 5000),
    ],
)
def test_size_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="is no size, give bytes, or a size such as"):
        parse_size(text)


def test_section_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^host is DiskConfig.*, give a HostConfig$"):
        Config(model=MODEL, host=DiskConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("lower", [{"host": HostConfig(num_blocks=4)}, {"disk": DiskConfig(size="1GiB", path="/kv")}])
def test_lower_tier_turns_offload_on(lower: dict[str, Any]) -> None:
    assert Config(model=MODEL, **lower).is_offload_enabled
    assert Config(model=MODEL, enable_offload=True, **lower).is_offload_enabled
    with pytest.raises(
        ConfigError, match=r"^enable_offload is false and there is a (host|disk) tier: leave \1.num_blocks"
    ):
        Config(model=MODEL, enable_offload=False, **lower)


def test_offload_without_a_lower_tier_is_refused() -> None:
    assert not Config(model=MODEL, enable_offload=False).is_offload_enabled
    with pytest.raises(
        ConfigError, match=r"^enable_offload is true and there is no lower tier: give host.num_blocks or"
    ):
        Config(model=MODEL, enable_offload=True, disk=DiskConfig(path="/kv"))
    with pytest.raises(ConfigError, match=r"^enable_offload is 'yes', give true, false, or leave it out"):
        Config(model=MODEL, enable_offload="yes")  # type: ignore[arg-type]


def test_number_of_blocks_follows_from_the_size() -> None:
    config = Config(model=MODEL, device=DeviceConfig(num_blocks=3), host=HostConfig(size=4 * BLOCK - 1 + BLOCK))
    assert config.num_blocks_of(Tier.DEVICE, BLOCK) == 3
    assert config.num_blocks_of("host", BLOCK) == 4
    assert config.num_blocks_of("host", BLOCK + 512) == 4
    assert config.num_blocks_of("disk", BLOCK) == 0
    with pytest.raises(ConfigError, match=r"^host.size is 163839 bytes and one block takes 163840: give at least that"):
        config.num_blocks_of("host", 5 * BLOCK)
    with pytest.raises(
        ConfigError, match=r"^there is no tier 'cloud' in the configuration, give device, host, disk or remote"
    ):
        config.num_blocks_of("cloud", BLOCK)
    assert config.num_blocks_of(Tier.REMOTE, BLOCK) == 0, "it was not asked for"


@pytest.mark.parametrize("size", [1, BLOCK - 1])
def test_size_that_holds_no_block_is_refused(size: int) -> None:
    with pytest.raises(
        ConfigError, match=f"^host.size is {size} bytes and one block takes {BLOCK}: give at least that"
    ):
        Config(model=MODEL, host=HostConfig(size=size))
    assert Config(model=MODEL, host=HostConfig(size=BLOCK)).num_blocks_of("host", BLOCK) == 1


def test_size_beyond_what_a_pool_holds_is_refused() -> None:
    tiny = ModelConfig(num_layers=1, inner_dim=1, outer_dim=1, block_size=1, dtype="uint8")
    with pytest.raises(ConfigError, match=r"^disk.size makes 1099511627776 blocks of 1 bytes, give room for at most"):
        Config(model=tiny, disk=DiskConfig(size="1TiB", path="/kv"))


@pytest.mark.parametrize(
    ("device", "host", "disk", "warned"),
    [
        (4, 4, 4, []),
        (4, 3, 4, ["tier=host blocks=3 is smaller than tier=device blocks=4"]),
        (4, None, 3, ["tier=disk blocks=3 is smaller than tier=device blocks=4"]),
        (4, 3, 2, ["tier=host blocks=3 is smaller", "tier=disk blocks=2 is smaller than tier=host blocks=3"]),
        (None, 3, None, []),
        (None, None, None, []),
    ],
)
def test_smaller_lower_tier_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, device: int | None, host: int | None, disk: int | None, warned: list[str]
) -> None:
    with caplog.at_level(logging.WARNING, "kvbm.config"):
        config = Config(
            model=MODEL,
            device=DeviceConfig(num_blocks=device),
            host=HostConfig(size=None if host is None else host * BLOCK),
            disk=DiskConfig(num_blocks=disk, path="/kv"),
        )
        config.num_blocks_of("host", BLOCK)
    assert len(caplog.messages) == len(warned)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, warned, strict=True))


def test_config_is_frozen_hashable_and_pickles() -> None:
    config = Config(model=MODEL, host=HostConfig(size="1GiB"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, msgspec.structs.replace(config)}) == 1
    with pytest.raises(AttributeError):
        config.host = HostConfig()  # type: ignore[misc]


def test_refusal_pickles() -> None:
    with pytest.raises(ConfigError) as refused:
        HostConfig(num_blocks=0)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
