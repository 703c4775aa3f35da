"""What the connector refuses of vLLM's configuration, and what names the bytes of a block; without vLLM."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.config import DiskConfig, HostConfig, OffloadConfig, RemoteConfig, RuntimeConfig
from kvbm.config.fields import fields_of
from kvbm.engines.vllm.fingerprint import fingerprint_of, kernel_of, variant_of
from kvbm.engines.vllm.settings import need_supported, of_replica, part_of, read_settings
from kvbm.errors import ConfigError

SPEC = SimpleNamespace(block_size=64)


class Values:
    """A model's configuration as transformers has it."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


class Tensor:
    """A tensor's outside."""

    dtype = "float16"

    def __init__(self, *shape: int, strides: tuple[int, ...]) -> None:
        self.shape = shape
        self._strides = strides

    def stride(self) -> tuple[int, ...]:
        return self._strides


def config(**changes: Any) -> SimpleNamespace:
    """Make a configuration of vLLM's with one thing changed."""
    model = {"model": "some/model", "revision": None, "dtype": "bfloat16", "quantization": None, "max_model_len": 4096}
    model |= {"hf_config": Values(rope_theta=1e4), "hf_text_config": SimpleNamespace(rope_parameters=None)}
    cache = {"cache_dtype": "auto", "block_size": 64, "prefix_caching_hash_algo": "sha256", "prefix_match_unit": None}
    parallel = dict.fromkeys(("pipeline_parallel_size", "decode_context_parallel_size"), 1)
    parts = [SimpleNamespace(**{**part, **changes}) for part in (model, cache, parallel)]
    return SimpleNamespace(model_config=parts[0], cache_config=parts[1], parallel_config=parts[2])


def long_rope(max_model_len: int) -> SimpleNamespace:
    """Make that of a model that has factors for texts of more than 4,096 tokens."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    return config(hf_text_config=SimpleNamespace(rope_parameters=rope), max_model_len=max_model_len)


@pytest.mark.parametrize(
    "other",
    [
        config(hf_config=Values(rope_theta=1e6)),
        config(model="another/model"),
        config(revision="v2"),
        config(cache_dtype="fp8"),
        config(block_size=32),
        long_rope(4096),
    ],
)
def test_what_changes_the_bytes_changes_the_fingerprint(other: SimpleNamespace) -> None:
    assert fingerprint_of(config(), "k") != fingerprint_of(other, "k")


def test_what_does_not_change_the_bytes_keeps_the_fingerprint() -> None:
    known = fingerprint_of(config(hf_config=Values(rope_theta=1e4, _name_or_path="/a", transformers_version="5")), "k")
    assert known == fingerprint_of(config(), "k") == fingerprint_of(config(max_model_len=9), "k")


def test_the_length_of_texts_counts_where_it_chooses_the_factors_of_keys() -> None:
    assert fingerprint_of(long_rope(100), "k") == fingerprint_of(long_rope(4096), "k")
    assert fingerprint_of(long_rope(4097), "k") != fingerprint_of(long_rope(4096), "k")


def test_scales_that_a_process_finds_for_itself_are_of_that_process() -> None:
    one = config(calculate_kv_scales=True)
    assert fingerprint_of(one, "k") != fingerprint_of(one, "k")


def test_an_adapter_that_was_trained_anew_is_another(tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(bytes(9000))
    asked = SimpleNamespace(lora_name="a", lora_path=str(tmp_path))
    known = variant_of(asked)
    assert known == variant_of(asked) != 0
    weights.write_bytes(bytes(4500) + b"x" + bytes(4499))
    assert variant_of(asked) != known
    assert variant_of(None) == 0


def test_an_adapter_whose_files_are_elsewhere_is_the_same_in_this_process_only() -> None:
    asked = SimpleNamespace(lora_name="a", lora_path="/nowhere/a")
    assert variant_of(asked) == variant_of(asked) != 0


def kernel(strides: tuple[int, ...], num_blocks: int = 8, isa: str = "vec") -> str:
    layers = {"a": SimpleNamespace(attn_backend=Values, isa=isa)}
    engine = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    return kernel_of(engine, ["a"], {"a": Tensor(num_blocks, 2, 4, 16, strides=strides)}, SPEC)


def test_how_kernels_arrange_a_block_is_in_their_name() -> None:
    known = kernel((128, 64, 16, 1))
    assert known == kernel((256, 64, 16, 1), num_blocks=99), "where blocks lie does not count"
    assert known != kernel((128, 16, 32, 1)), "tokens outside heads"
    assert known != kernel((128, 64, 16, 1), isa="amx"), "keys packed for other instructions"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"prefix_match_unit": 32}, r"prefix_match_unit is 32, blocks have \[64\] tokens"),
    ],
)
def test_an_engine_whose_blocks_are_not_ours_to_name_is_refused(changes: dict[str, Any], words: str) -> None:
    caches = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SPEC)])
    need_supported(config(prefix_match_unit=64), caches)
    with pytest.raises(ConfigError, match=words):
        need_supported(config(**changes), caches)


def test_sizes_are_shared_by_ranks_and_groups_and_replicas_have_folders_of_their_own(tmp_path: Path) -> None:
    sections = {"host": {"size": "8KiB"}, "disk": {"path": str(tmp_path), "size": 800}}
    mine = part_of(sections, group=1, num_groups=2, rank=1, num_ranks=2)
    assert (mine["host"]["size"], mine["disk"]["size"]) == (2048, 200)
    assert mine["disk"]["path"] == str(tmp_path / "group1")
    alone = SimpleNamespace(data_parallel_size=1, data_parallel_rank=0)
    assert of_replica(sections, alone) == sections
    second = SimpleNamespace(data_parallel_size=2, data_parallel_rank=1)
    assert of_replica(sections, second)["disk"]["path"] == str(tmp_path / "replica1")


@pytest.mark.parametrize(("found", "is_refused"), [(None, True), (object, False)])
def test_a_model_with_several_groups_needs_a_vllm_that_can_be_told_which_requests_failed(
    monkeypatch: pytest.MonkeyPatch, found: Any, is_refused: bool
) -> None:
    # By its own names: whoever runs the fake engine before has the module imported anew.
    monkeypatch.setitem(need_supported.__globals__, "feature", {"named failures": found}.get)
    groups = [SimpleNamespace(kv_cache_spec=SPEC), SimpleNamespace(kv_cache_spec=SPEC)]
    refusal = pytest.raises(ConfigError, match=r"2 groups of layers.*use vLLM 0\.30 or newer")
    with refusal if is_refused else contextlib.nullcontext():
        need_supported(config(), SimpleNamespace(kv_cache_groups=groups))
    need_supported(config(), SimpleNamespace(kv_cache_groups=groups[:1]))


# -- sections of our configuration ----------------------------------------------------------------------------------

# Whose each key is; `test_arrange` and those of the storages show that it arrives there.
OF_WORKERS = {
    *(f"{tier}.{key}" for tier in ("host", "disk", "remote") for key in ("num_blocks", "size", "layout")),
    *("host.allocator", "host.huge_pages", "disk.path", "disk.slab", "disk.on_mismatch", "disk.sync_interval_s"),
    *("disk.engine", "disk.depth", "disk.direct_io", "disk.max_queued_size", "remote.url", "remote.prefix"),
    *("remote.endpoint", "remote.region", "remote.allow_http", "remote.max_concurrency", "remote.request_timeout_s"),
    *("offload.staging_blocks", "offload.verify_checksums", "runtime.copy_threads", "runtime.io_threads"),
}
OF_THE_SCHEDULER = {
    *(f"{tier}.{key}" for tier in ("host", "disk", "remote") for key in ("eviction", "ttl")),
    *("disk.offload_policy", "disk.write_budget", "remote.offload_policy", "remote.probe_blocks", "remote.absent_s"),
    *("remote.known_s", "remote.away_s", "offload.policy", "offload.queue_blocks", "offload.job_blocks"),
    *("offload.route_jobs", "offload.in_flight_share", "offload.lineage_blocks", "offload.touch_calls"),
    *("offload.use_count_blocks", "runtime.offload_timeout_s"),
}
TIERS: dict[str, dict[str, Any]] = {
    "host": {"size": "1GiB"}, "disk": {"size": "1GiB", "path": "/x"}, "remote": {"url": "memory://"},
}  # fmt: skip


def test_every_key_of_the_configuration_is_somebodys_or_refused() -> None:
    kinds = (HostConfig, DiskConfig, RemoteConfig, OffloadConfig, RuntimeConfig)
    for section, key in [(kind.section, key) for kind in kinds for key in fields_of(kind)]:
        taken = OF_WORKERS | OF_THE_SCHEDULER
        given = {**TIERS, section: {**TIERS.get(section, {}), key: 1}}
        if f"{section}.{key}" in taken:
            assert read_settings(given)[0][section][key] == 1
        else:
            with pytest.raises(ConfigError, match=f"{section}.{key} has no effect in vLLM, leave it out: "):
                read_settings(given)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"host": None}, "host is None, give an object"),
        ({"host": True}, "host is True, give an object"),
        ({"host": "1GiB", "disk": {"path": "/x", "ttl": "6h"}}, "disk has neither size nor num_blocks"),
        ({"host": "1GiB", "remote": {"probe_blocks": 9}}, "remote has no url"),
        ({"host": "1GiB", "offload": {"policy": "second_use"}}, "from host memory to disk or remote, and there is"),
        ({**TIERS, "offload": {"policy": "priority"}}, "offload.policy is 'priority', use another"),
        ({**TIERS, "disk": {**TIERS["disk"], "offload_policy": "priority"}}, "disk.offload_policy is 'priority'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_connector_extra_config.*{words}"):
        read_settings(extra)


def test_the_write_budget_is_shared_by_ranks_and_groups_and_no_budget_stays_none(tmp_path: Path) -> None:
    folder = tmp_path / "not made"
    for budget, part in (("8KiB", 2048), (3, 1), (0, 0), ("0", "0")):
        sections = {"disk": {"path": str(folder), "size": 800, "write_budget": budget}}
        mine = part_of(sections, group=0, num_groups=2, rank=0, num_ranks=2, makes_folder=False)
        assert mine["disk"]["write_budget"] == part
    one = part_of(sections | {"disk": {"write_budget": 8}}, group=0, num_groups=2, rank=0, num_ranks=2, is_shared=True)
    assert one["disk"]["write_budget"] == 4
    assert not folder.exists()
