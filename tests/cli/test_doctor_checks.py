"""What the doctor looks at by itself: settings, sizes, memory, versions, the disk's place and its slabs."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbm.engines.doctor import versions
from kvbm.engines.doctor.disk import check_disk, compare_slabs, file_system_of
from kvbm.engines.doctor.examine import make_tiny_model
from kvbm.engines.doctor.findings import Finding, State, exit_status
from kvbm.engines.doctor.memory import check_host_memory, check_memlock, check_pages
from kvbm.engines.doctor.setup import check_transfer, make_setup, make_transfer, read_transfer
from kvbm.engines.doctor.sizes import check_sizes
from kvbm.errors import ConfigError
from kvbm.fingerprint import model_fingerprint
from kvbm.layout import BlockLayout
from kvbm.storage.disk import DiskStorage


def states_of(findings: list[Finding]) -> dict[str, State]:
    return {one.subject: one.state for one in findings}


def make(extra: dict[str, Any] | None = None, **more: Any) -> Any:
    transfer = {**make_transfer("1MiB", None, None, None), **more.pop("transfer", {})}
    if extra is not None:
        transfer["kv_connector_extra_config"] = extra
    return make_setup(transfer, engine=more.pop("engine", {}), **more)


def test_our_part_of_several_connectors_is_read(tmp_path: Path) -> None:
    ours, other = make_transfer("1MiB", None, None, None), {"kv_connector": "OtherConnector"}
    several = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [other, ours]}}
    found = read_transfer(json.dumps({**several, "kv_load_failure_policy": "fail"}))
    assert found == {**ours, "kv_load_failure_policy": "fail"}
    several["kv_connector_extra_config"] = {"connectors": [other]}
    with pytest.raises(ConfigError, match="has 0 connectors of the name KvbmConnector, give it one"):
        read_transfer(json.dumps(several))


def test_what_the_engine_is_told_is_looked_at() -> None:
    assert exit_status(check_transfer(make())) == 0
    wrong = states_of(check_transfer(make(transfer={"kv_connector_module_path": "elsewhere"})))
    assert wrong["connector"] is State.UNSAFE
    assert states_of(check_transfer(make(transfer={"kv_role": "kv_producer"})))["connector"] is State.WARNING
    assert states_of(check_transfer(make({"disk": {"path": "/x", "size": 1 << 20}})))["host tier"] is State.UNSAFE
    unverified = make({"host": "1MiB", "offload": {"verify_checksums": False}})
    assert states_of(check_transfer(unverified))["checksums"] is State.WARNING
    silent = make()
    del silent.transfer["kv_load_failure_policy"]
    assert states_of(check_transfer(silent))["kv_load_failure_policy"] is State.WARNING


@pytest.mark.parametrize(
    ("device", "host", "disk", "states"),
    [
        ("1GiB", "1GiB", "1GiB", ["ok", "ok"]),
        ("2GiB", "1GiB", "4GiB", ["warning", "ok"]),
        ("1GiB", "2GiB", "1GiB", ["ok", "warning"]),
        (None, "2GiB", "1GiB", ["note", "warning"]),
        (None, "2GiB", None, ["note"]),
    ],
)
def test_a_lower_tier_is_to_be_no_smaller(device: str | None, host: str, disk: str | None, states: list[str]) -> None:
    extra: dict[str, Any] = {"host": host}
    if disk is not None:
        extra["disk"] = {"size": disk, "path": "/x"}
    setup = make(extra, engine={} if device is None else {"kv_cache_memory_bytes": device})
    assert [one.state.value for one in check_sizes(setup)] == states


def test_sizes_in_blocks_are_compared_once_a_block_is_known() -> None:
    setup = make({"host": {"num_blocks": 10}, "disk": {"num_blocks": 5, "path": "/x"}}, device_nbytes=1000)
    assert check_sizes(setup) == []
    first, second = check_sizes(setup, block_nbytes=60, num_groups=2)
    assert (first.state, second.state) == (State.OK, State.WARNING)
    assert "1.17 KiB" in first.found


def test_ranks_that_share_one_copy_need_room_for_one() -> None:
    engine = {"kv_cache_memory_bytes": "1GiB", "tensor_parallel_size": 4}
    setup = make({"host": "2GiB"}, engine=engine)
    assert [one.state.value for one in check_sizes(setup)] == ["warning"]
    setup = replace(setup, has_one_copy=True)
    assert [one.state.value for one in check_sizes(setup)] == ["ok"]
    setup = replace(make({"host": {"num_blocks": 10}}, engine=engine), has_one_copy=True)
    assert setup.nbytes_of("host", block_nbytes=60, num_groups=2) == 1200


@pytest.mark.parametrize(
    ("nbytes", "limit", "state"),
    [(1 << 30, "max", "ok"), (3 << 30, "max", "warning"), (5 << 30, "max", "unsafe"), (1 << 30, 1 << 29, "unsafe")],
)
def test_host_memory_is_compared_with_machine_and_container(
    tmp_path: Path, nbytes: int, limit: int | str, state: str
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:  {4 << 20} kB\nMemFree: 5 kB\nMemAvailable:  {2 << 20} kB\n")
    (tmp_path / "max").write_text(f"{limit}\n")
    files = {"meminfo": tmp_path / "meminfo", "limit": tmp_path / "max", "used": tmp_path / "absent"}
    (found,) = check_host_memory(nbytes, **files)
    assert found.state.value == state
    assert ("container" in found.found) == (limit != "max")


def test_what_a_container_has_used_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:  {4 << 20} kB\nMemAvailable:  {3 << 20} kB\n")
    (tmp_path / "max").write_text(str(2 << 30))
    (tmp_path / "used").write_text(str(3 << 29))
    files = {"meminfo": tmp_path / "meminfo", "limit": tmp_path / "max", "used": tmp_path / "used"}
    assert [check_host_memory(nbytes, **files)[0].state for nbytes in (1 << 28, 1 << 30)] == [State.OK, State.WARNING]
    assert check_host_memory(1, **{**files, "meminfo": tmp_path / "absent"})[0].state is State.NOTE
    assert check_host_memory(None) == []


def test_huge_pages_and_locked_memory_are_looked_at() -> None:
    assert check_pages(make(), huge_pages="madvise").state is State.OK
    assert check_pages(make(), huge_pages="never").state is State.WARNING
    assert check_pages(make({"host": {"size": 1 << 20, "huge_pages": False}}), huge_pages="never").state is State.NOTE
    assert check_memlock(1 << 30, limit=1 << 20, has_gpu=False).state is State.OK
    assert check_memlock(1 << 30, limit=1 << 20, has_gpu=True).state is State.WARNING
    assert check_memlock(1 << 30, limit=None, has_gpu=True).state is State.OK


def test_versions_out_of_range_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found = states_of(versions.check_versions("0.32.0", torch="2.13.0", python=(3, 11)))
    assert (found["vllm"], found["torch"], found["python"]) == (State.OK, State.OK, State.OK)
    found = states_of(versions.check_versions("0.27.1", torch="2.13.0", python=(3, 9)))
    assert (found["vllm"], found["python"]) == (State.WARNING, State.WARNING)
    assert states_of(versions.check_versions("0.33.0rc1", torch="x"))["vllm"] is State.WARNING
    assert states_of(versions.check_versions("", torch="x"))["vllm"] is State.WARNING
    twin = namedtuple("Twin", "name reason")("pure", "no native modules")
    monkeypatch.setattr(versions, "default_backend", lambda: twin)
    monkeypatch.setattr(versions, "installed_version", lambda *names: None)
    found = states_of(versions.check_versions("0.32.0", has_remote=True))
    assert (found["kvbm"], found["torch"], found["obstore"]) == (State.WARNING, State.UNSAFE, State.UNSAFE)


def disk_states(path: Path | str, size: str = "1MiB", **more: Any) -> dict[str, State]:
    return states_of(check_disk(make({"host": "1MiB", "disk": {"path": str(path), "size": size}}), **more))


def test_the_place_of_the_disk_tier_is_looked_at(tmp_path: Path) -> None:
    assert disk_states(tmp_path)["disk"] is State.OK
    assert disk_states(tmp_path / "made at start")["disk"] is State.OK
    assert disk_states(tmp_path / "nobody" / "makes this")["disk"] is State.UNSAFE
    assert disk_states("/dev/null/slabs")["disk"] is State.UNSAFE
    assert disk_states("/proc/slabs")["disk"] is State.UNSAFE
    assert disk_states(tmp_path, size="1PiB")["disk room"] is State.UNSAFE
    assert disk_states(tmp_path)["disk room"] is State.OK
    assert states_of(check_disk(make()))["disk"] is State.NOTE


def test_file_systems_that_forget_or_lie_far_away_are_warned_of(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    deep = tmp_path / "a b"
    deep.mkdir()
    escaped = str(deep).replace(" ", "\\040")
    lines = ["1 0 8:1 / / rw - ext4 /dev/x rw", f"2 1 0:5 / {escaped} rw shared:3 - tmpfs none rw", "broken"]
    mounts.write_text("\n".join(lines))
    assert (file_system_of(tmp_path, mounts), file_system_of(deep, mounts)) == ("ext4", "tmpfs")
    assert disk_states(tmp_path, mounts=mounts)["file system"] is State.OK
    assert disk_states(deep, mounts=mounts)["file system"] is State.WARNING
    mounts.write_text("1 0 8:1 / / rw - nfs4 host:/x rw")
    assert disk_states(tmp_path, mounts=mounts)["file system"] is State.WARNING
    assert disk_states(tmp_path, mounts=tmp_path / "absent")["file system"] is State.NOTE


def open_slab(folder: Path, model: str) -> DiskStorage:
    layout = BlockLayout.fully_contiguous(
        num_blocks=4, num_layers=2, outer_dim=1, block_size=1, inner_dim=64, dtype="uint8"
    )
    return DiskStorage(layout, folder, fingerprint=f"kvbm-slab-v1; model={model}; layers=2")


def test_a_slab_of_another_model_is_found_before_the_engine_refuses_it(tmp_path: Path) -> None:
    for folder, model in (("there", "old"), ("golden", "new"), ("golden/group1", "new"), ("there/group1", "new")):
        open_slab(tmp_path / folder, model).close()
    (found,) = compare_slabs(tmp_path / "there", tmp_path / "golden")
    assert found.state is State.UNSAFE
    assert "holds blocks of another model or layout: model=old there, model=new here;" in found.found
    (found,) = compare_slabs(tmp_path / "there", tmp_path / "golden", is_replaced=True)
    assert found.state is State.WARNING
    assert compare_slabs(tmp_path / "absent", tmp_path / "golden") == []


def test_a_slab_in_use_and_a_broken_one_are_told_of(tmp_path: Path) -> None:
    with open_slab(tmp_path, "a"):
        (slab,) = (one for one in check_disk(make({"disk": {"path": str(tmp_path), "size": 1 << 20}}))
                   if one.subject == "slab")  # fmt: skip
        assert slab.state is State.NOTE
        assert f"held by process {os.getpid()}" in slab.found
    (tmp_path / "rank0.index").write_bytes(bytes(8192))
    assert disk_states(tmp_path)["slab"] is State.WARNING


def test_the_tiny_model_has_what_a_fingerprint_needs(tmp_path: Path) -> None:
    assert model_fingerprint(make_tiny_model(tmp_path / "model")).startswith("model-v1,type=llama")
