"""Dicts, TOML files, the environment and their merger: names, sources, and what is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from kvbm.config import Config
from kvbm.errors import ConfigError

MODEL = {"num_layers": 2, "inner_dim": 64}
IN_ENVIRONMENT = {"KVBM_MODEL__NUM_LAYERS": "2", "KVBM_MODEL__INNER_DIM": "64"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvbm.toml"
    path.write_text('[model]\nnum_layers = 2\ninner_dim = 64\npage_size = 16\n[host]\nsize = "8 MiB"\n')
    return path


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"modle": {}}, "modle is no known key, did you mean model? known here: model, runtime, device, host, disk, "),
        (
            {"disk": {"num_block": 4}},
            "disk.num_block is no known key, did you mean disk.num_blocks? known in disk: num_",
        ),
        ({"host": {"layout_type": ""}}, "host.layout_type is no known key, did you mean host.layout? known in host: "),
        ({"block_size": 16}, "block_size is no known key, did you mean model.block_size? known here: "),
        ({"host": {"path": "/kv"}}, "host.path is no known key, did you mean disk.path? known in host: "),
        ({"host": {"qqq": 1}}, "host.qqq is no known key, known in host: num_blocks, size, layout, eviction, "),
        ({3: {}}, "3 is no known key, known here: "),
        ({"host": {"a b": 1}}, "host.'a b' is no known key, "),
        ({"host": 4}, "host is 4, give a table of keys: num_blocks, size, "),
        ({"host": None}, "host is not given, give a table of keys: num_blocks, size, "),
        (
            {},
            "model.num_layers is missing, give 1 or more: as num_layers in the section model, or in the environ",
        ),
        ({"model": {"num_layers": 2}}, "model.inner_dim is missing, give 1 or more: "),
        ([], "a configuration must be a mapping of sections, got []"),
        (
            {"model": {**MODEL, "page_size": 16, "block_size": 32}},
            "model.block_size is given twice, as 16 and, by the ",
        ),
        (
            {"model": MODEL, "disk": {"path": "/a"}, "offload_path": "/b"},
            "disk.path is given twice, as '/a' and, by the ",
        ),
    ],
)
def test_dict_with_impossible_keys_is_refused(mapping: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_dict(mapping)
    assert str(refused.value).startswith(message)
    assert "from" not in str(refused.value)


def test_other_names_mean_the_same() -> None:
    ours = Config.from_dict({"model": {**MODEL, "block_size": 16}, "disk": {"path": "/kv", "num_blocks": 4}})
    theirs = {"model": {**MODEL, "page_size": 16}, "disk": {"num_blocks": 4}, "offload_path": "/kv"}
    both = {"model": {**MODEL, "page_size": 16, "block_size": 16}, "disk": {"path": "/kv", "num_blocks": 4}}
    assert ours == Config.from_dict(theirs) == Config.from_dict({**both, "offload_path": "/kv"})


def test_none_in_a_dict_is_as_left_out() -> None:
    assert (
        Config.from_dict(
            {"model": MODEL, "host": {"size": None, "num_blocks": 4}, "enable_offload": None}
        ).host.num_blocks
        == 4
    )
    assert (
        Config.from_dict({"model": {**MODEL, "page_size": 16}, "disk": {"path": None}, "offload_path": "/kv"}).disk.path
        == "/kv"
    )


def test_file_is_read(file: Path) -> None:
    config = Config.from_toml(file)
    assert (config.model.block_size, config.host.nbytes) == (16, 8 << 20)
    assert config == Config.from_toml(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layers = ", "configuration file {file} is no valid TOML: "),
        ("a = \udcff", "configuration file {file} is no valid TOML: 'utf-8' codec can't decode"),
        ("a = " + "[" * 5000, "configuration file {file} is no valid TOML: "),
        ("a = " + "9" * 5000, "configuration file {file} is no valid TOML: "),
        ("[host]\nnum_block = 4", "host.num_block is no known key, did you mean host.num_blocks? "),
        ("[host]\nnum_blocks = 0", "host.num_blocks is 0, give 1 or more, or leave the tier out (from file {file})"),
        ("host = 4", "host is 4, give a table of keys: "),
        ("[host]\nsize = 1979-05-27", "host.size is datetime.date(1979, 5, 27), give bytes, or a size "),
    ],
)
def test_bad_file_is_refused_with_its_name(file: Path, text: str, message: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"^" + re.escape(message.format(file=file))) as refused:
        Config.from_toml(file)
    assert f"file {file}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_absent_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory$"):
        Config.from_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        Config.from_toml(tmp_path)


def test_environment_is_read_by_the_keys_types() -> None:
    config = Config.from_environment(
        {
            **IN_ENVIRONMENT,
            "KVBM_MODEL__PAGE_SIZE": " 16 ",
            "KVBM_MODEL__WEIGHTS_EPOCH": "7",
            "KVBM_DEVICE__NUM_BLOCKS": "4",
            "KVBM_DEVICE__GPU_MEMORY_FRACTION": "0.5",
            "KVBM_HOST__SIZE": "8 MiB",
            "KVBM_HOST__HUGE_PAGES": "off",
            "KVBM_DISK__SIZE": "83886080",
            "KVBM_DISK__DIRECT_IO": "TRUE",
            "KVBM_OFFLOAD_PATH": "/with a space ",
            "KVBM_ENABLE_OFFLOAD": "1",
            "KVBM_RUNTIME__WORKER_ID": "0",
            "KVBM_RUNTIME__CLOSE_TIMEOUT_S": "3",
        }
    )
    assert (config.model.block_size, config.model.weights_epoch, config.device.num_blocks) == (16, 7, 4)
    assert (config.device.gpu_memory_fraction, config.host.nbytes, config.host.huge_pages) == (0.5, 8 << 20, False)
    assert (config.disk.nbytes, config.disk.direct_io, config.disk.path) == (83886080, True, "/with a space ")
    assert (config.enable_offload, config.runtime.worker_id, config.runtime.close_timeout_s) == (True, "0", 3.0)


def test_variables_that_are_no_settings_are_left_alone() -> None:
    others = {"KVBM_BACKEND": "pure", "KVBM_DEVICE": "cpu", "KVBM_CPU": "avx2", "KVBM_CONFIG": "/absent.toml"}
    others |= {"KVBM_NATIVE": "OFF", "KVBM_HOST__SIZE": "", "kvbm_host__size": "1", "OTHER_KVBM_HOST__SIZE": "1"}
    assert Config.from_environment({**IN_ENVIRONMENT, **others}) == Config.from_dict({"model": MODEL})


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "KVBM_DISK__NUM_BLOCK",
            "4",
            "environment variable KVBM_DISK__NUM_BLOCK names no key, did you mean KVBM_DISK__NUM_",
        ),
        (
            "KVBM_HSOT__SIZE",
            "4",
            "environment variable KVBM_HSOT__SIZE names no key, did you mean KVBM_HOST__SIZE? sect",
        ),
        ("KVBM_QQQQ__ZZZZ", "4", "environment variable KVBM_QQQQ__ZZZZ names no key, sections: model, runtime, "),
        ("KVBM___SIZE", "4", "environment variable KVBM___SIZE names no key, "),
        ("KVBM_HOST__", "4", "environment variable KVBM_HOST__ names no key, "),
        ("KVBM_HOST__NUM_BLOCKS", "four", "host.num_blocks is 'four', give 1 or more, or leave the tier out (from "),
        ("KVBM_HOST__NUM_BLOCKS", "9" * 5000, "host.num_blocks is '9999"),
        (
            "KVBM_HOST__HUGE_PAGES",
            "maybe",
            "host.huge_pages is 'maybe', give true or false (from environment KVBM_HOST__",
        ),
        ("KVBM_ENABLE_OFFLOAD", "true", "enable_offload is true and there is no lower tier: "),
    ],
)
def test_bad_variable_is_refused_with_its_name(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_environment({**IN_ENVIRONMENT, variable: text})
    assert str(refused.value).startswith(message)
    assert variable in str(refused.value)


def test_single_underscore_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Config.from_environment({**IN_ENVIRONMENT, "KVBM_HOST_NUM_BLOCKS": "4"})
    assert caplog.messages == [
        "variable=KVBM_HOST_NUM_BLOCKS is no setting and was left alone, with two underscores it is: "
        "KVBM_HOST__NUM_BLOCKS"
    ]


def test_later_source_wins_key_by_key(file: Path) -> None:
    environ = {"KVBM_MODEL__NUM_LAYERS": "3", "KVBM_MODEL__BLOCK_SIZE": "32", "KVBM_CONFIG": str(file)}
    config, sources = Config.load_with_sources(overrides={"model": {"num_layers": 4}}, environ=environ)
    assert (config.model.num_layers, config.model.block_size, config.model.inner_dim) == (4, 32, 64)
    assert sources == {
        "model.num_layers": "overrides",
        "model.block_size": "environment KVBM_MODEL__BLOCK_SIZE",
        "model.inner_dim": f"file {file}",
        "host.size": f"file {file}",
    }


def test_given_file_goes_before_the_one_in_the_environment(file: Path) -> None:
    assert Config.load(file, environ={"KVBM_CONFIG": "/absent.toml"}) == Config.from_toml(file)
    with pytest.raises(ConfigError, match=r"^configuration file /absent.toml cannot be read"):
        Config.load(environ={"KVBM_CONFIG": "/absent.toml"})


def test_count_and_size_of_a_tier_replace_each_other(file: Path) -> None:
    config = Config.load(file, environ={"KVBM_HOST__NUM_BLOCKS": "5"})
    assert (config.host.num_blocks, config.host.size) == (5, None)
    config = Config.load(file, {"host": {"size": "1GiB"}}, {"KVBM_HOST__NUM_BLOCKS": "5"})
    assert (config.host.num_blocks, config.host.nbytes) == (None, 1 << 30)
    assert Config.load(file, {"host": {"size": None}}, {}).host.is_present is False


@pytest.mark.parametrize(
    ("environ", "overrides", "message"),
    [
        (
            {"KVBM_HOST__NUM_BLOCKS": "0"},
            None,
            "host.num_blocks is 0, .* \\(from environment KVBM_HOST__NUM_BLOCKS\\)$",
        ),
        ({}, {"host": {"num_blocks": 0}}, "host.num_blocks is 0, .* \\(from overrides\\)$"),
        ({}, {"hots": {}}, "hots is no known key, did you mean host\\? .* \\(from overrides\\)$"),
        (
            {"KVBM_ENABLE_OFFLOAD": "no"},
            None,
            "enable_offload is false .* \\(from environment KVBM_ENABLE_OFFLOAD and file ",
        ),
        ({"KVBM_MODEL__NUM_HEADS": "3"}, None, ".* \\(from file .*kvbm.toml and environment KVBM_MODEL__NUM_HEADS\\)$"),
        ({"KVBM_HOST__SIZE": "5"}, None, "host.size is 5 bytes .* \\(from environment KVBM_HOST__SIZE\\)$"),
        ({"KVBM_DISK__SIZE": "1GiB"}, None, "disk.path is not given, .* \\(from environment KVBM_DISK__SIZE\\)$"),
    ],
)
def test_refusal_says_which_source_it_came_from(
    file: Path, environ: dict[str, str], overrides: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=r"^" + message):
        Config.load(file, overrides, environ)


@pytest.mark.parametrize(
    ("environ", "tiers", "notes"),
    [
        (
            {"DYN_KVBM_CPU_CACHE_GB": "1.5"},
            (None, 1_500_000_000, None, None),
            ["variable=DYN_KVBM_CPU_CACHE_GB became host.size=1500000000"],
        ),
        (
            {"DYN_KVBM_CPU_CACHE_GB": "16", "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "9"},
            (9, None, None, None),
            [
                "variable=DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS became host.num_blocks=9",
                "variable=DYN_KVBM_CPU_CACHE_GB is left out: host.num_blocks or host.size is given already",
            ],
        ),
        (
            {"DYN_KVBM_DISK_CACHE_GB": "1", "DYN_KVBM_DISK_CACHE_DIR": "/kv"},
            (None, None, None, 10**9),
            [
                "variable=DYN_KVBM_DISK_CACHE_GB became disk.size=1000000000",
                "variable=DYN_KVBM_DISK_CACHE_DIR became disk.path=/kv",
            ],
        ),
        (
            {"DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "7", "KVBM_OFFLOAD_PATH": "/kv"},
            (None, None, 7, None),
            ["variable=DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS became disk.num_blocks=7"],
        ),
        (
            {"DYN_KVBM_CPU_CACHE_GB": "16", "KVBM_HOST__NUM_BLOCKS": "3"},
            (3, None, None, None),
            ["variable=DYN_KVBM_CPU_CACHE_GB is left out: host.num_blocks or host.size is given already"],
        ),
        (
            {"DYN_KVBM_CPU_CACHE_GB": "0", "DYN_KVBM_DISK_CACHE_GB": " "},
            (None, None, None, None),
            ["variable=DYN_KVBM_CPU_CACHE_GB value=0 is left out: 0 means no host tier"],
        ),
    ],
)
def test_reference_names_are_accepted_with_one_note_each(
    caplog: pytest.LogCaptureFixture, environ: dict[str, str], tiers: tuple[int | None, ...], notes: list[str]
) -> None:
    with caplog.at_level(logging.INFO, "kvbm.config"):
        config = Config.from_environment({**IN_ENVIRONMENT, **environ})
    assert (config.host.num_blocks, config.host.nbytes, config.disk.num_blocks, config.disk.nbytes) == tiers
    assert caplog.messages == notes


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "1e12"])
def test_reference_name_with_a_bad_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^environment variable DYN_KVBM_CPU_CACHE_GB is '{text}', give gigabytes"):
        Config.from_environment({**IN_ENVIRONMENT, "DYN_KVBM_CPU_CACHE_GB": text})
    with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS"):
        Config.from_environment({**IN_ENVIRONMENT, "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": text})


def test_reference_size_with_a_bad_sum_names_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"disk.path is not given.*\(from environment DYN_KVBM_DISK_CACHE_GB\)"):
        Config.from_environment({**IN_ENVIRONMENT, "DYN_KVBM_DISK_CACHE_GB": "4"})
