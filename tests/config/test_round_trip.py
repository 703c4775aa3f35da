"""Properties: what is written is read back, junk is refused, and the schema agrees with the loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvbm.config import (
    LAYOUTS,
    Config,
    DeviceConfig,
    DiskConfig,
    HostConfig,
    ModelConfig,
    OffloadConfig,
    RuntimeConfig,
)
from kvbm.errors import ConfigError
from kvbm.layout import DTYPES

COUNTS = st.integers(1, 2**31 - 2)
SIZES = st.one_of(
    st.integers(1 << 40, 1 << 45),
    st.builds(
        "{}{}{}".format, st.integers(1100, 5000), st.sampled_from(["", " "]), st.sampled_from(["GiB", "gb", "GB"])
    ),
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)
SHARES = st.floats(0, 1, exclude_min=True)
SECONDS = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)


@st.composite
def tiers(draw: st.DrawFn, kind: type[Any], **more: st.SearchStrategy[Any]) -> Any:
    amount = draw(st.sampled_from(["num_blocks", "size", None]))
    values = {"layout": st.sampled_from(LAYOUTS), "eviction": st.sampled_from(["lru", "fifo"]), **more}
    chosen = {name: draw(value) for name, value in values.items()}
    if amount is not None:
        chosen[amount] = draw(COUNTS if amount == "num_blocks" else SIZES)
    return kind(**chosen)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    num_heads = draw(st.integers(1, 128))
    return ModelConfig(
        num_layers=draw(st.integers(1, 128)),
        outer_dim=draw(st.integers(1, 2)),
        block_size=draw(st.integers(16, 256)),
        inner_dim=num_heads * draw(st.integers(1, 16)),
        num_heads=num_heads,
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        fingerprint=draw(st.none() | TEXTS),
        weights_epoch=draw(st.none() | TEXTS | st.integers(-(2**63) + 1, 2**63 - 1)),
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    host = draw(tiers(HostConfig, huge_pages=st.booleans()))
    disk = draw(tiers(DiskConfig, path=TEXTS, direct_io=st.booleans()))
    parts = {
        "runtime": st.builds(
            RuntimeConfig,
            worker_id=TEXTS,
            backend=st.sampled_from(["auto", "native", "pure"]),
            copy_threads=st.integers(0, 64),
            onboard_timeout_s=SECONDS,
            close_timeout_s=SECONDS,
            small_copy=st.just(0) | SIZES,
        ),
        "device": tiers(DeviceConfig, gpu_memory_fraction=SHARES, copy_thread_blocks=st.integers(0, 65535)),
        "offload": st.builds(
            OffloadConfig,
            policy=st.sampled_from(["always", "second_use", "priority"]),
            in_flight_share=SHARES,
            verify_checksums=st.booleans(),
            min_priority=st.integers(0, 100),
        ),
        "enable_offload": st.sampled_from([None, host.is_present or disk.is_present]),
    }
    chosen = {name: draw(part) for name, part in parts.items()}
    try:
        return Config(model=draw(models()), host=host, disk=disk, **chosen)
    except ConfigError as error:  # a size that makes no block of this model, or too many
        assume("blocks of" not in str(error) and "one block takes" not in str(error))
        raise


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "kvbm.toml"


@settings(deadline=None)
@given(config=configs(), origin=st.none() | st.text(st.characters(exclude_categories=("Cs",))))
def test_any_config_survives_toml(file: Path, config: Config, origin: str | None) -> None:
    file.write_text(config.to_toml(None if origin is None else {"model.num_layers": origin}), "utf-8", newline="")
    assert Config.from_toml(file) == config


@settings(deadline=None)
@given(config=configs())
def test_any_config_survives_dict_and_fits_the_schema(config: Config) -> None:
    plain = config.to_dict()
    assert Config.from_dict(plain) == config
    validator().validate(json.loads(json.dumps(plain)))


NAMES = st.sampled_from(
    [
        *("model", "runtime", "device", "host", "disk", "offload", "enable_offload", "offload_path", "num_layers"),
        *("inner_dim", "page_size", "block_size", "num_blocks", "size", "path", "layout", "eviction", "policy"),
        *("small_copy", "worker_id"),
    ]
)
ODD = st.sampled_from(
    [10**400, -(10**400), float("nan"), float("inf"), "9" * 30, "8G", "\ud800", "\0", b"x", object(), ...]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["8GiB", "lru", "1"]) | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text() | st.integers(), inner, max_size=6),
    max_leaves=20,
)
SECTIONS = st.dictionaries(NAMES, JUNK, max_size=4)


def refusal_of(read: Callable[[Any], Config], source: Any) -> ConfigError | None:
    """Give the ConfigError that a source raises; any other error ends the test."""
    try:
        config = read(source)
    except ConfigError as error:
        return error
    assert Config.from_dict(config.to_dict()) == config
    return None


@settings(deadline=None, max_examples=500)
@given(junk=JUNK | st.dictionaries(NAMES, SECTIONS, max_size=5))
def test_junk_raises_config_error_only(junk: Any) -> None:
    good = {"model": {"num_layers": 2, "inner_dim": 64}}
    for mapping in (junk, {**good, **junk} if isinstance(junk, dict) else {**good, "host": junk}):
        assert "\n" not in str(refusal_of(Config.from_dict, mapping))


@settings(deadline=None)
@given(
    name=st.sampled_from(["HOST__SIZE", "DISK__DIRECT_IO", "ENABLE_OFFLOAD", "MODEL__WEIGHTS_EPOCH"])
    | st.text().map(lambda text: f"HOST__{text}"),
    text=st.text(),
)
def test_junk_in_the_environment_raises_config_error_only(name: str, text: str) -> None:
    environ = {"KVBM_MODEL__NUM_LAYERS": "2", "KVBM_MODEL__INNER_DIM": "64", f"KVBM_{name}": text}
    assert "\n" not in str(refusal_of(Config.from_environment, environ))


# -- the schema ------------------------------------------------------------------------------------------------------


def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is tested with jsonschema (extra test)")
    return jsonschema.Draft202012Validator(Config.schema())


def test_schema_is_one_and_describes_every_key_with_its_default() -> None:
    validator().check_schema(Config.schema())
    definitions = Config.schema()["$defs"]
    others = {"page_size", "offload_path"}
    assert set(definitions) >= {"Config", "RuntimeConfig", "ModelConfig", "HostConfig", "OffloadConfig"}
    for kind, definition in definitions.items():
        assert definition["additionalProperties"] is False
        assert "\n" not in definition["description"]
        for name, entry in definition["properties"].items():
            assert entry["description"].endswith("."), (kind, name)
            assert "default" in entry or "$ref" in entry or name in definition["required"] or name in others, (
                kind,
                name,
            )


@pytest.mark.parametrize(
    ("extra", "is_good"),
    [
        ({}, True),
        ({"host": {"size": "8 GiB"}, "enable_offload": True}, True),
        ({"host": {"size": 1 << 30, "layout": "layer_separate_block_first"}}, True),
        ({"disk": {"num_blocks": 4}, "offload_path": "/kv"}, True),
        ({"model": {"num_layers": 2, "inner_dim": 64, "page_size": 16, "dtype": "bfloat16"}}, True),
        ({"host": {"size": None, "num_blocks": 4}}, True),
        ({"host": {"size": "8G"}}, False),
        ({"host": {"num_blocks": 0}}, False),
        ({"host": {"num_blocks": 2**31}}, False),
        ({"host": {"num_blocks": 4, "size": "1GiB"}}, False),
        ({"host": {"num_block": 4}}, False),
        ({"model": {"num_layers": 2, "inner_dim": 64, "dtype": "fp16"}}, False),
        ({"device": {"gpu_memory_fraction": 0}}, False),
        ({"enable_offload": "yes"}, False),
        ({"model": {"num_layers": 2}}, False),
        ({"block_size": 16}, False),
    ],
)
def test_schema_and_loader_agree(extra: dict[str, Any], is_good: bool) -> None:
    mapping = {"model": {"num_layers": 2, "inner_dim": 64}, **extra}
    assert validator().is_valid(mapping) is is_good
    if is_good:
        Config.from_dict(mapping)
    else:
        with pytest.raises(ConfigError):
            Config.from_dict(mapping)
