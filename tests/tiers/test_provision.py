"""From a configuration to storages: settings reach them, sizes are bounds, a fingerprint names what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tier_site import MODEL, PATIENCE_S, Site, names

from kvbm._backend import Backend, load_backend
from kvbm.config import Config
from kvbm.errors import ConfigError, SlabFormatError
from kvbm.fingerprint import find_fingerprint, slab_fingerprint
from kvbm.provision import make_storage
from kvbm.storage.disk import DiskStorage
from kvbm.storage.object_store import ObjectStorage
from kvbm.types import Tier

SLOT_NBYTES, RECORD_NBYTES, HEADERS_NBYTES = 4096, 64, 8192
LOCK_NBYTES = 20  # at most: who holds the slab


def config_of(section: str, **settings: Any) -> Config:
    return Config.from_dict({"model": MODEL, "device": {"num_blocks": 4}, section: settings})


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Collect what the storages of the disk and of the store are made with."""
    heard: dict[str, Any] = {}

    def listen(kind: type[Any]) -> None:
        begin = kind.__init__

        def listening(storage: Any, layout: Any, where: Any, **settings: Any) -> None:
            heard.update(settings, where=where)
            begin(storage, layout, where, **settings)

        monkeypatch.setattr(kind, "__init__", listening)

    listen(DiskStorage)
    listen(ObjectStorage)
    return heard


# -- disk ------------------------------------------------------------------------------------------------------------


def test_settings_of_the_disk_tier_reach_the_slab(tmp_path: Path, backend: Backend, told: dict[str, Any]) -> None:
    config = Config.from_dict(
        {
            "model": MODEL,
            "runtime": {"io_threads": 3},
            "disk": {
                "path": str(tmp_path), "num_blocks": 5, "slab": "rank7", "on_mismatch": "replace", "engine": "python",
                "sync_interval_s": 0.25, "depth": 9, "direct_io": False, "max_queued_size": "1MiB",
            },
        }
    )  # fmt: skip
    with make_storage(config, Tier.DISK, model="toy", backend=backend) as storage:
        assert isinstance(storage, DiskStorage)
        assert storage.engine_name == "python"
        assert storage.io_mode == "buffered"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rank7.blocks", "rank7.index", "rank7.lock"]
    assert told == {
        "where": str(tmp_path), "name": "rank7", "fingerprint": slab_fingerprint("toy", storage.layout),
        "on_mismatch": "replace", "engine": "python", "num_threads": 3, "depth": 9, "use_direct_io": False,
        "max_queued_nbytes": 1 << 20, "sync_interval_s": 0.25, "backend": backend,
    }  # fmt: skip


def test_slabs_of_several_names_share_a_directory(tmp_path: Path, backend: Backend) -> None:
    for slab in ("rank0", "rank1"):
        config = config_of("disk", path=str(tmp_path), num_blocks=3, slab=slab)
        make_storage(config, Tier.DISK, model="toy", backend=backend).close()
    assert len(list(tmp_path.glob("*.blocks"))) == 2


def test_slab_of_another_model_is_refused_or_replaced_as_set(tmp_path: Path, backend: Backend) -> None:
    settings: dict[str, Any] = {"path": str(tmp_path), "num_blocks": 3}
    make_storage(config_of("disk", **settings), Tier.DISK, model="llama", backend=backend).close()
    with pytest.raises(SlabFormatError) as refusal:
        make_storage(config_of("disk", **settings), Tier.DISK, model="qwen", backend=backend)
    assert "model=llama" in str(refusal.value)
    assert "model=qwen" in str(refusal.value), "both are printed"
    replacing = config_of("disk", **settings, on_mismatch="replace")
    make_storage(replacing, Tier.DISK, model="qwen", backend=backend).close()
    make_storage(config_of("disk", **settings), Tier.DISK, model="qwen", backend=backend).close()


@pytest.mark.parametrize(
    "spare_nbytes", [HEADERS_NBYTES + LOCK_NBYTES, HEADERS_NBYTES + LOCK_NBYTES + SLOT_NBYTES - RECORD_NBYTES]
)
@pytest.mark.parametrize("num_slots", [4, 12, 63, 64])
def test_files_of_the_disk_tier_stay_within_its_size(tmp_path: Path, num_slots: int, spare_nbytes: int) -> None:
    size = num_slots * (SLOT_NBYTES + RECORD_NBYTES) + spare_nbytes
    config = config_of("disk", path=str(tmp_path), size=size)
    with make_storage(config, Tier.DISK, model=None, backend=load_backend("pure")) as storage:
        found = {path.name: path.stat() for path in tmp_path.iterdir()}
        files = {name: max(status.st_size, 512 * status.st_blocks) for name, status in found.items()}
        assert storage.num_blocks >= num_slots - 2, "and use it"
    assert sum(files.values()) <= size, files


# -- object store ----------------------------------------------------------------------------------------------------


def test_settings_of_the_remote_tier_reach_the_store(tmp_path: Path, backend: Backend, told: dict[str, Any]) -> None:
    config = Config.from_dict(
        {
            "model": MODEL,
            "runtime": {"offload_timeout_s": 12.0},
            "remote": {
                "url": "s3://bucket/folder", "prefix": "team", "endpoint": "http://127.0.0.1:9", "region": "eu-1",
                "allow_http": True, "max_concurrency": 7, "request_timeout_s": 1.5, "num_blocks": 11,
            },
        }
    )  # fmt: skip
    with make_storage(config, Tier.REMOTE, model="toy", backend=backend) as storage:
        assert isinstance(storage, ObjectStorage)
        assert storage.num_blocks == 11
        assert storage.root.startswith("team/")
    assert told == {
        "where": "s3://bucket/folder", "fingerprint": slab_fingerprint("toy", storage.layout), "prefix": "team",
        "max_concurrency": 7, "timeout_s": 1.5, "deadline_s": 12.0, "listing_timeout_s": 12.0,
        "options": {"endpoint": "http://127.0.0.1:9", "region": "eu-1", "allow_http": True},
    }  # fmt: skip


def test_remote_settings_that_are_left_out_are_left_to_the_provider(backend: Backend, told: dict[str, Any]) -> None:
    make_storage(config_of("remote", url="memory://"), Tier.REMOTE, model="toy", backend=backend).close()
    assert told["options"] == {}


# -- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Give a directory like a model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "uint8"}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def train(model: Path) -> None:
    """Change the weights."""
    (model / "model.safetensors").write_bytes(b"\1" + bytes(999))


def with_model(model: Path | None) -> dict[str, Any]:
    return {**MODEL, "fingerprint": None if model is None else str(model)}


def test_path_of_a_model_gives_its_computed_fingerprint_to_hashes_slab_and_store(
    make_tiers: Site, model: Path, told: dict[str, Any]
) -> None:
    tiers = make_tiers(device=4, disk=4, settings={"model": with_model(model)})
    computed = find_fingerprint(str(model))
    assert computed.startswith("model-v1,type=toy")
    assert tiers.manager.model == computed
    assert told["fingerprint"] == slab_fingerprint(computed, tiers.manager.storage("disk").layout)
    assert str(model) not in told["fingerprint"], "other machines keep it elsewhere"
    first = tiers.manager.sequence(range(8)).hashes
    settings = {"model": with_model(model), "remote": {"url": "memory://"}}
    other = make_tiers(device=4, settings=settings)
    assert told["fingerprint"] == slab_fingerprint(computed, other.manager.storage("remote").layout)
    assert np.array_equal(other.manager.sequence(range(8)).hashes, first)
    train(model)
    third = make_tiers(device=4, settings=settings)
    assert (
        find_fingerprint(str(model))
        in told["fingerprint"]
        != slab_fingerprint(computed, third.manager.storage("remote").layout)
    )
    assert not np.isin(third.manager.sequence(range(8)).hashes, first).any()


def test_slab_is_refused_when_the_weights_have_changed(make_tiers: Site, model: Path, tmp_path: Path) -> None:
    settings = {"model": with_model(model), "disk": {"path": str(tmp_path / "slab")}}
    hashes = names(3)
    one = make_tiers(device=4, disk=8, settings=settings)
    one.put(hashes)
    one.manager.flush(PATIENCE_S)
    one.manager.close()
    again = make_tiers(device=4, disk=8, settings=settings)
    assert again.num_hit(hashes) == 3
    again.manager.close()
    train(model)
    with pytest.raises(SlabFormatError, match="weights="):
        make_tiers(device=4, disk=8, settings=settings)


def test_store_keeps_blocks_of_other_weights_apart(make_tiers: Site, model: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    settings = {"model": with_model(model), "remote": {"url": f"file://{tmp_path / 'store'}"}}
    hashes = names(3)
    one = make_tiers(device=4, settings=settings)
    one.put(hashes)
    one.manager.flush(PATIENCE_S)
    one.manager.close()
    again = make_tiers(device=4, settings=settings)
    again.settle()
    assert again.num_hit(hashes) == 3
    again.manager.close()
    train(model)
    other = make_tiers(device=4, settings=settings)
    other.settle()
    assert other.num_hit(hashes) == 0


def test_remote_tier_without_a_model_is_refused(make_tiers: Site) -> None:
    with pytest.raises(ConfigError, match=r"an object store is shared, so it needs to know the model: give model"):
        make_tiers(device=4, settings={"model": with_model(None), "remote": {"url": "memory://"}})


# -- bad copies ------------------------------------------------------------------------------------------------------


def test_block_that_is_written_again_after_its_bad_copy_was_found_stays(make_tiers: Site, tmp_path: Path) -> None:
    """The bad copy is forgotten before the answer, so that nothing forgets its successor later."""
    settings = {"disk": {"path": str(tmp_path / "slab")}}
    tiers = make_tiers(device=4, host=8, disk=8, settings=settings)
    hashes = names(1)
    tiers.put_below(hashes, "disk")
    slots = tiers.pool("disk").lookup(hashes)
    tiers.spoil_disk(hashes[0], 3)
    storage = tiers.manager.storage("disk")
    gate = make_tiers.gate(tiers, "ForgetJob")
    assert tiers.num_hit(hashes) == 0
    assert not storage.holds(slots, hashes).any()
    tiers.put(hashes)
    tiers.manager.flush(PATIENCE_S)
    gate.open()
    tiers.settle()
    assert storage.holds(tiers.pool("disk").lookup(hashes), hashes).tolist() == [True]
    tiers.manager.close()
    again = make_tiers(device=4, host=8, disk=8, settings=settings)
    assert again.num_hit(hashes) == 1
