"""The object store tier in the real engine: it loads what another engine has stored, and no store costs a text.

One engine fills a store; each test starts its own engine on a copy of that.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from vllm_site import Engine, Texts, needs_vllm, prompt_of

from kvbm.planner.presence import Presence
from kvbm.testing.proxy import FaultyProxy, ProxyFault
from kvbm.types import Tier

pytest.importorskip("obstore", reason="obstore is not installed: pip install 'kvbm-native[s3]'")

pytestmark = [*needs_vllm, pytest.mark.timeout(180)]  # what waits for a store for ever fails sooner
Start = Callable[..., Engine]
PROMPTS = [prompt_of(120 + seed, num_tokens) for seed, num_tokens in enumerate((300, 480, 680))]
WHOLE = [256, 448, 640]
NUM_BLOCKS = 21  # of 64 tokens; the texts fill no other
OTHERS = [prompt_of(130 + seed, 500) for seed in range(5)]  # of 7 blocks each, and one with the text
HOST, SMALL_HOST = "16MiB", "6MiB"  # 128 and 48 blocks; a quarter of them may be on their way at once
_HEADER_NBYTES = 64
_EXPONENT = 103  # of a float32 in a block: with this bit the other way the number is another one by 2**128
_SOON_S = 20.0  # the store itself gives up after 30
PATIENCE_S = 60.0


class Kept(NamedTuple):
    """A store that an engine has filled, and the texts that it wrote."""

    folder: Path
    texts: Texts

    @property
    def objects(self) -> list[Path]:
        """The objects, in the order of their names."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def filled(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("store") / "objects"
    engine = Engine(model_of("llama"), extra={"host": HOST, "remote": {"url": folder.as_uri()}})
    try:
        cold = [engine.generate([prompt]) for prompt in PROMPTS]
        assert [cached for _, cached in cold] == [[0]] * len(PROMPTS)
        engine.calm()
        assert routes(engine)[Tier.HOST, Tier.REMOTE].blocks == NUM_BLOCKS
    finally:
        engine.close()
    kept = Kept(folder, [text for texts, _ in cold for text in texts])
    assert len(kept.objects) == NUM_BLOCKS
    return kept


@pytest.fixture
def kept(filled: Kept, tmp_path: Path) -> Kept:
    return filled._replace(folder=Path(shutil.copytree(filled.folder, tmp_path / "objects")))


def over(kept: Kept, **more: Any) -> dict[str, Any]:
    return {"host": HOST, "remote": {"url": kept.folder.as_uri()}} | more


def routes(engine: Engine) -> dict[tuple[Tier, Tier], Any]:
    (group,) = engine.half._groups
    moved: dict[tuple[Tier, Tier], Any] = group.planner.statistics().routes
    return moved


def num_hit(engine: Engine) -> dict[str, int]:
    """Blocks that were loaded, by the tier that they lay in."""
    (group,) = engine.half._groups
    return {tier: num_blocks for tier, num_blocks in group.planner.statistics().hits.items() if num_blocks}


def presence_of(engine: Engine) -> Presence:
    """What the scheduler's half knows of the store."""
    (group,) = engine.half._groups
    (presence,) = group.planner.presences
    assert isinstance(presence, Presence)
    return presence


def store_of(engine: Engine) -> Any:
    """The worker's storage."""
    return engine.worker._shards[0].storages[Tier.REMOTE]


@pytest.mark.vllm_smoke
def test_fresh_engine_loads_from_the_store_what_another_has_computed(start: Start, kept: Kept) -> None:
    engine = start(extra=over(kept, host=SMALL_HOST))
    assert engine.generate(PROMPTS) == (kept.texts, WHOLE)
    assert num_hit(engine) == {"remote": NUM_BLOCKS}
    assert routes(engine)[Tier.REMOTE, Tier.HOST].blocks == NUM_BLOCKS
    assert store_of(engine).counters.num_reads == NUM_BLOCKS, "counted in the worker"
    engine.settle()
    assert store_of(engine).counters.num_writes == 0, "all of it was there"
    for prompt in OTHERS:  # host memory is too small for these and those
        engine.generate([prompt])
        engine.settle()
    engine.forget()
    assert engine.generate(PROMPTS) == (kept.texts, WHOLE)
    assert num_hit(engine)["remote"] > NUM_BLOCKS, "what host memory has given up came from the store"
    engine.calm()


def test_what_another_engine_stores_meanwhile_is_found(start: Start, kept: Kept, tmp_path: Path) -> None:
    elsewhere = kept.folder.rename(tmp_path / "elsewhere")
    engine = start(extra=over(kept))  # the store is empty
    assert engine.generate(OTHERS[:1])[1] == [0]
    shutil.copytree(elsewhere, kept.folder, dirs_exist_ok=True)
    assert engine.generate(PROMPTS) == (kept.texts, WHOLE)
    assert num_hit(engine) == {"remote": NUM_BLOCKS}
    assert engine.generate(OTHERS[1:2])[1] == [0]
    engine.calm()


def test_flipped_bits_in_objects_change_no_text(start: Start, kept: Kept) -> None:
    flipped = kept.objects[::3]
    for path in flipped:
        data = bytearray(path.read_bytes())
        data[_HEADER_NBYTES + _EXPONENT] ^= 0x40
        path.write_bytes(data)
    engine = start(extra=over(kept))
    texts, cached = engine.generate(PROMPTS)
    assert texts == kept.texts
    assert sum(cached) < sum(WHOLE)
    (group,) = engine.half._groups
    assert dict(group.planner.statistics().mismatches) == {"remote": len(flipped)}
    engine.forget()
    assert engine.generate(PROMPTS) == (kept.texts, WHOLE), "what was computed again is kept again"
    engine.forget()
    engine.forget_memory()
    assert engine.generate(PROMPTS) == (kept.texts, WHOLE), "in the store as well"
    assert dict(group.planner.statistics().mismatches) == {"remote": len(flipped)}
    engine.calm()


@pytest.fixture
def silent() -> Iterator[FaultyProxy]:
    """Give a server that takes requests and never answers."""
    with FaultyProxy(1) as proxy:
        proxy.inject(ProxyFault.BLACKHOLE)
        yield proxy


def test_store_that_does_not_answer_at_the_start_holds_nothing_up(
    start: Start, filled: Kept, silent: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    remote = {"url": "s3://bucket/kv", "endpoint": f"http://127.0.0.1:{silent.port}", "allow_http": True}
    engine = start(extra={"host": HOST, "remote": {**remote, "region": "nowhere", "request_timeout_s": 0.2}})
    assert silent.num_requests > 0, "it was asked for a listing"
    assert [engine.generate([prompt])[0][0] for prompt in PROMPTS] == filled.texts
    engine.forget()
    assert engine.generate(PROMPTS) == (filled.texts, WHOLE), "from host memory"
    dropped = routes(engine)[Tier.HOST, Tier.REMOTE].dropped
    assert sum(dropped.values()) == NUM_BLOCKS
    silent.disconnect()  # and then it is not even there
    engine.generate(OTHERS[:1])
    engine.calm()
    assert num_hit(engine) == {"host": NUM_BLOCKS}


def test_store_that_goes_away_and_comes_back_changes_no_text(
    start: Start, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbm.storage.object_store.client import _ObstoreClient

    extra = over(kept, load_timeout_s=0.5)
    extra["remote"]["request_timeout_s"] = 60.0
    engine = start(extra=extra)
    store, presence = store_of(engine), presence_of(engine)
    with monkeypatch.context() as patch:
        asked = threading.Event()

        async def hang(*given: Any) -> None:
            asked.set()
            await asyncio.Event().wait()

        patch.setattr(_ObstoreClient, "get", hang)
        began_at = time.monotonic()
        assert engine.generate(PROMPTS) == (kept.texts, [0, 0, 0]), "it took longer than a load may"
        assert asked.is_set()
        assert time.monotonic() - began_at < _SOON_S
        engine.forget()
        engine.forget_memory()

    store._breaker._first_cool_down_s = 0.05
    is_back = threading.Event()
    store.on_availability(lambda is_available: is_back.set() if is_available else None)
    away = tmp_path / "away"
    kept.folder.rename(away)
    kept.folder.touch()  # what was a directory is a file: every request fails
    assert engine.generate(PROMPTS) == (kept.texts, [0, 0, 0]), "every request has failed"
    engine.settle()
    assert presence.is_away
    assert not store.is_available
    presence._away_until = np.inf
    engine.forget()
    engine.forget_memory()
    before = num_hit(engine)
    assert engine.generate(PROMPTS) == (kept.texts, [0, 0, 0])
    assert num_hit(engine) == before, "it is left alone"

    kept.folder.unlink()
    away.rename(kept.folder)
    assert is_back.wait(PATIENCE_S)
    engine.forget()
    engine.forget_memory()
    presence._away_until = -np.inf  # its time is over
    assert engine.generate(PROMPTS) == (kept.texts, WHOLE)
    assert store.counters.num_reads == NUM_BLOCKS
    engine.calm()
