"""Fingerprints: other weights, another text; the same files, the same text, wherever they lie."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbm import fingerprint
from kvbm.errors import ConfigError
from kvbm.fingerprint import MAX_FINGERPRINT_NBYTES, find_fingerprint, model_fingerprint, slab_fingerprint
from kvbm.layout import BlockLayout, Strides

LAYOUT = BlockLayout.fully_contiguous(
    num_blocks=4, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16", num_heads=2
)
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "num_hidden_layers": 2}
NBYTES = 100_000
BLOB = "a" * 64


def make_model(folder: Path, *, config: dict[str, Any] | None = None, names: tuple[str, ...] = ("a", "b")) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    for name in names:
        file = folder / f"{name}.safetensors"
        file.write_bytes(bytes((i * 7 + ord(name)) % 251 for i in range(NBYTES)))
        os.utime(file, ns=(5, 5))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def weights(folder: Path) -> Path:
    return folder / "a.safetensors"


def keep_time(file: Path, change: Callable[[Path], None]) -> None:
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def add_file(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


# -- models ----------------------------------------------------------------------------------------------------


def test_fingerprint_reads_and_does_not_depend_on_the_path(model: Path, tmp_path: Path) -> None:
    text = model_fingerprint(model)
    assert text.startswith("model-v1,type=llama,revision=,dtype=bfloat16,quantisation=none,config=")
    assert text.isascii()
    assert len(text) < 400
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert model_fingerprint(copy) == model_fingerprint(str(copy)) == text


@pytest.mark.parametrize(
    "change",
    [
        lambda m: keep_time(weights(m), lambda file: flip(file, 0)),
        lambda m: keep_time(weights(m), lambda file: flip(file, NBYTES - 1)),
        lambda m: keep_time(weights(m), lambda file: flip(file, NBYTES // 3)),
        lambda m: keep_time(weights(m), lambda file: file.write_bytes(file.read_bytes()[::-1])),
        lambda m: keep_time(weights(m), lambda file: os.truncate(file, NBYTES - 1)),
        lambda m: keep_time(weights(m), lambda file: os.truncate(file, 0)),
        lambda m: os.utime(weights(m), ns=(5, 6)),
        lambda m: weights(m).rename(m / "c.safetensors"),
        lambda m: weights(m).unlink(),
        lambda m: shutil.copy2(weights(m), m / "c.bin"),
        lambda m: add_file(m, "config.json", json.dumps({**CONFIG, "rope_theta": 1e6})),
        lambda m: add_file(m, "modeling_llama.py", "pass"),
        lambda m: add_file(m, "quantize_config.json", '{"bits": 4}'),
    ],
    ids=[
        *("first byte", "last byte", "a byte between", "other bytes", "shorter", "empty", "touched", "renamed"),
        *("removed", "added", "other config", "own code", "quantised"),
    ],
)
def test_every_change_of_the_model_changes_the_fingerprint(model: Path, change: Callable[[Path], Any]) -> None:
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_swapped_weights_change_the_fingerprint(model: Path) -> None:
    before = model_fingerprint(model)
    a, b, aside = model / "a.safetensors", model / "b.safetensors", model / "aside"
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "README.md", "chat_template.json"])
def test_files_that_do_not_change_the_cache_do_not_count(model: Path, name: str) -> None:
    before = model_fingerprint(model)
    add_file(model, name, '{"changed": true}')
    (model / "original").mkdir()
    assert model_fingerprint(model) == before


def test_fingerprint_does_not_depend_on_the_order_of_the_directory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model_fingerprint(model)

    class Backwards:
        def __init__(self, path: Path) -> None:
            self.entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *error: object) -> None:
            pass

    class Os:
        scandir = Backwards

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    monkeypatch.setattr(fingerprint, "os", Os())
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantisation=awq,"),
        ({"quantization_config": {"quant_algo": "FP8; x"}}, "quantisation=FP8__x,"),
        ({"quantization_config": {"bits": 4}}, "quantisation=unnamed,"),
        ({"quantization": "gptq"}, "quantisation=gptq,"),
        ({"torch_dtype": None}, "dtype=,"),
        ({"dtype": "float16"}, "dtype=float16,"),
        ({"model_type": "é\n" * 100}, f"type={'_' * 64},"),
    ],
)
def test_fingerprint_names_dtype_and_quantisation(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    assert expected in model_fingerprint(make_model(tmp_path / "model", config=config))


def test_quantisation_is_found_in_a_file_of_its_own(model: Path) -> None:
    add_file(model, "hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}')
    assert "quantisation=NVFP4," in model_fingerprint(model)


# -- caches of Hugging Face ------------------------------------------------------------------------------------


def make_cache(root: Path, revision: str, *, blob: str = BLOB, mtime_ns: int = 5) -> Path:
    repository = root / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / revision
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for name, digest, content in (
        ("config.json", "b" * 40, json.dumps(CONFIG).encode()),
        ("model.safetensors", blob, bytes(NBYTES)),
    ):
        (blobs / digest).write_bytes(content)
        os.utime(blobs / digest, ns=(mtime_ns, mtime_ns))
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_two_workers_that_fetched_the_same_model_agree(tmp_path: Path) -> None:
    here, there = (make_cache(tmp_path / str(i), "abc", mtime_ns=i) for i in (5, 6))
    assert model_fingerprint(here) == model_fingerprint(there)
    assert "revision=abc," in model_fingerprint(here)


def test_another_blob_or_revision_is_another_model(tmp_path: Path) -> None:
    base = model_fingerprint(make_cache(tmp_path / "0", "abc"))
    assert model_fingerprint(make_cache(tmp_path / "1", "abc", blob="c" * 64)) != base
    other = model_fingerprint(make_cache(tmp_path / "2", "abd"))
    assert other == base.replace("revision=abc", "revision=abd") != base
    assert model_fingerprint(tmp_path / "2/models--org--name/snapshots/abd", revision="abc") == base


def test_changed_bytes_of_a_blob_are_noticed(tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path, "abc")
    before = model_fingerprint(snapshot)
    flip(snapshot.parents[1] / "blobs" / BLOB, NBYTES - 1)
    assert model_fingerprint(snapshot) != before


def test_a_link_to_a_snapshot_has_its_revision(tmp_path: Path) -> None:
    snapshot = make_cache(tmp_path, "abc")
    link = tmp_path / "current"
    link.symlink_to(snapshot)
    assert model_fingerprint(link) == model_fingerprint(snapshot)


def test_links_elsewhere_count_by_the_time_of_what_they_point_to(model: Path, tmp_path: Path) -> None:
    file = weights(model)
    kept = tmp_path / BLOB  # named like a blob, not among blobs
    file.rename(kept)
    file.symlink_to(kept)
    before = model_fingerprint(model)
    os.utime(kept, ns=(5, 6))
    assert model_fingerprint(model) != before


# -- what cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "a.safetensors"])
def test_missing_blob_is_a_clear_error(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to(f"../blobs/{BLOB}")
    with pytest.raises(ConfigError, match=rf"cannot read .*{name} .*no such file.*give a text that names the model"):
        find_fingerprint(str(model))


def test_file_that_the_system_refuses_is_a_clear_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*permission denied; make it readable, or give a text"):
        fingerprint._describe(weights(model))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["config.json", "a.safetensors", "."])
def test_file_without_permission_is_a_clear_error(model: Path, name: str) -> None:
    (model / name).chmod(0)
    try:
        with pytest.raises(ConfigError, match=r"cannot read .*permission denied; make it readable"):
            find_fingerprint(str(model))
    finally:
        (model / name).chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_broken_config_is_a_clear_error(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json is not .*JSON.*fetch it again"):
        model_fingerprint(model)


def test_directory_without_weights_or_config_is_a_clear_error(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (model / f"{name}.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weight files"):
        model_fingerprint(model)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        model_fingerprint(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read .*absent.*no such file"):
        model_fingerprint(tmp_path / "absent")


# -- settings --------------------------------------------------------------------------------------------------


def test_setting_is_read_where_it_names_a_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_fingerprint(str(model)) == model_fingerprint(model)
    monkeypatch.chdir(model.parent)
    assert find_fingerprint("model") == model_fingerprint(model)


@pytest.mark.parametrize("text", ["org/name", "x" * 10_000, "a\0b", "", "model-v1,type=llama"])
def test_any_other_text_stands_for_itself(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_fingerprint(text) == text


def test_directory_that_is_no_model_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kvbm.fingerprint"):
        assert find_fingerprint(str(tmp_path)) == str(tmp_path)
    assert "is a directory without config.json" in caplog.text


def test_large_checkpoint_costs_a_few_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    for i in range(20):
        with (model / f"model-{i:05}.safetensors").open("wb") as file:
            file.truncate(5 << 30)  # a sparse file; 100 GiB in all
    counted = []
    describe = fingerprint._describe

    def count(path: Path) -> list[bytes]:
        parts = describe(path)
        counted.append(sum(map(len, parts)))
        return parts

    monkeypatch.setattr(fingerprint, "_describe", count)
    began = time.perf_counter()
    model_fingerprint(model)
    assert time.perf_counter() - began < 2  # milliseconds, with room for a busy machine
    assert len(counted) == 22
    assert max(counted) < 20_000


# -- slabs -----------------------------------------------------------------------------------------------------


def test_slab_fingerprint_is_readable() -> None:
    assert slab_fingerprint("llama", LAYOUT, kernel_variant="fa3", rank=1, num_ranks=2, hash_seed="7") == (
        "kvbm-slab-v1; model=llama; dtype=float16; layers=2; outer=2; tokens=16; inner=8; heads=2; block_nbytes=1024; "
        "order=token,head; kernel=fa3; rank=1/2; hash=kvbm-root-v1; seed=7"
    )


HEAD_MAJOR = replace(LAYOUT, strides=Strides(block=1024, layer=512, outer=256, token=8, head=128))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"model": None},
        {"layout": HEAD_MAJOR},
        {"layout": replace(LAYOUT, dtype="bfloat16")},
        {"kernel_variant": "b"},
        {"rank": 1},
        {"num_ranks": 3},
        {"hash_algorithm": "sha256"},
        {"hash_seed": "1"},
    ],
)
def test_everything_that_decides_the_bytes_changes_the_slab(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"model": "llama", "layout": LAYOUT, "kernel_variant": "a", "rank": 0, "num_ranks": 2}
    assert slab_fingerprint(**settings) != slab_fingerprint(**{**settings, **change})


def test_how_many_blocks_and_where_they_lie_in_memory_does_not_count() -> None:
    dimensions = {"num_layers": 2, "outer_dim": 2, "block_size": 16, "inner_dim": 8, "dtype": "float16", "num_heads": 2}
    separate = BlockLayout.layer_separate(block_first=True, num_blocks=9, alignment=4096, **dimensions)  # type: ignore[arg-type]
    assert slab_fingerprint("llama", separate) == slab_fingerprint("llama", LAYOUT)


def test_values_cannot_pass_for_other_values() -> None:
    texts = ["a; dtype=x", "a%3B dtype=x", "a\n", "a%0A", "é", "%C3%A9", "a" * 10_000, "a" * 10_001, "\ud800"]
    slabs = {slab_fingerprint(text, LAYOUT) for text in texts}
    assert len(slabs) == len(texts)
    for slab in slabs:
        assert len(slab.split("; ")) == 14
        assert slab.isascii()
        assert slab.isprintable()


def test_slab_fingerprint_is_bounded() -> None:
    long = "é" * 5000
    slab = slab_fingerprint(long, LAYOUT, kernel_variant=long, hash_algorithm="a" * 400, hash_seed="b" * 400)
    assert len(slab.encode()) <= MAX_FINGERPRINT_NBYTES
    full = slab_fingerprint("m" * 400, LAYOUT, kernel_variant="k" * 400, hash_algorithm="a" * 400, hash_seed="b" * 400)
    assert 1700 < len(full) <= MAX_FINGERPRINT_NBYTES


@pytest.mark.parametrize(("rank", "num_ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_rank_outside_its_size_is_refused(rank: int, num_ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"rank is {rank} of {num_ranks}, give 0 to"):
        slab_fingerprint("llama", LAYOUT, rank=rank, num_ranks=num_ranks)
