"""An adapter's files are read once, and again whenever they may be others: no adapter is taken for another one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.engines.vllm import fingerprint
from kvbm.engines.vllm.fingerprint import variant_of

LATER_S = 10


def adapter_at(folder: Path, content: bytes = b"one") -> Any:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(content)
    return SimpleNamespace(lora_name=folder.name, lora_path=str(folder))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the names of the files that are opened to be read."""
    names: list[str] = []
    do_open = Path.open

    def note(path: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        if "r" in mode:
            names.append(path.name)
        return do_open(path, mode, *given, **more)

    monkeypatch.setattr(Path, "open", note)
    return names


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file look as if nobody has touched it for a while."""
    clock = SimpleNamespace(time_ns=lambda: time.time_ns() + LATER_S * 10**9)
    monkeypatch.setattr(fingerprint, "time", clock)


@pytest.mark.usefixtures("later")
def test_requests_of_an_adapter_that_is_known_open_no_file(tmp_path: Path, opened: list[str]) -> None:
    one, other = adapter_at(tmp_path / "one"), adapter_at(tmp_path / "other", b"two")
    (tmp_path / "one" / "adapter_config.json").write_bytes(b"{}")
    names = [variant_of(one), variant_of(other)]
    assert opened == ["adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors"]
    for _ in range(3):
        assert [variant_of(one), variant_of(other)] == names
    assert len(opened) == 3
    assert names[0] != names[1]


@pytest.mark.usefixtures("later")
def test_a_file_that_is_written_anew_with_its_old_size_and_time_is_another(tmp_path: Path) -> None:
    asked = adapter_at(tmp_path / "a")
    known = variant_of(asked)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    before = weights.stat()
    while weights.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system has ticks
        weights.write_bytes(b"two")
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert variant_of(asked) != known


@pytest.mark.usefixtures("later")
def test_a_file_that_another_one_takes_the_place_of_is_another(tmp_path: Path) -> None:
    asked = adapter_at(tmp_path / "a")
    known = variant_of(asked)
    weights, new = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "new"
    new.write_bytes(b"two")
    os.utime(new, ns=(0, weights.stat().st_mtime_ns))
    new.replace(weights)
    assert variant_of(asked) != known
    (tmp_path / "a" / "tokenizer.json").write_bytes(b"{}")
    assert variant_of(asked) not in (known, 0)


def test_a_file_that_may_change_without_a_sign_is_read_each_time(tmp_path: Path, opened: list[str]) -> None:
    asked = adapter_at(tmp_path / "a")  # just now
    assert variant_of(asked) == variant_of(asked)
    assert len(opened) == 2


@pytest.mark.usefixtures("later")
def test_a_folder_that_is_switched_while_it_is_read_names_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = adapter_at(tmp_path / "first"), adapter_at(tmp_path / "second", b"two")
    link = tmp_path / "served"

    def serve(name: str) -> None:
        (tmp_path / "next").symlink_to(name)
        (tmp_path / "next").replace(link)

    serve("first")
    asked = SimpleNamespace(lora_name="served", lora_path=str(link))
    do_open: Callable[..., Any] = Path.open

    def switch(path: Path, *given: Any, **more: Any) -> Any:
        if link in path.parents:
            serve("second")
        return do_open(path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", switch)
        between = variant_of(asked)
    names = [variant_of(first), variant_of(second)]
    assert between not in names
    assert variant_of(asked) == names[1]
    serve("first")
    assert variant_of(asked) == names[0], "what was read of the second is not taken for it"


@pytest.mark.usefixtures("later")
def test_adapters_that_are_known_are_limited_in_number(tmp_path: Path, opened: list[str]) -> None:
    asked = [adapter_at(tmp_path / str(number)) for number in range(fingerprint._NUM_ADAPTERS + 1)]
    for one in asked:
        variant_of(one)
    opened.clear()
    variant_of(asked[1])
    assert not opened
    variant_of(asked[0])
    assert len(opened) == 1
