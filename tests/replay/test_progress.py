"""The progress of a replay: what is done is skipped once, counts once, and another replay is refused."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvbm._backend import Backend
from kvbm.errors import ConfigError
from kvbm.manager import BlockManager
from kvbm.replay import TraceRequest, replay, replay_concurrently
from kvbm.replay.progress import FILE_NAME, WINDOW_REQUESTS, ReplayProgress, Totals
from kvbm.replay.report import Served
from kvbm.replay.warm_start import WarmStart
from kvbm.types import HashArray

SETTINGS = {"trace": "a.jsonl", "tiers": "device 500 blocks"}
SERVED = Served(blocks=4, hit_blocks=3, hits_by_tier={"disk": 2, "host": 1})


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def hashes_of(place: int, num_blocks: int = 4) -> HashArray:
    return np.stack([np.full(num_blocks, place, dtype=np.uint64), np.arange(num_blocks, dtype=np.uint64)], axis=1)


def requests(num_requests: int) -> list[TraceRequest]:
    return [TraceRequest(hashes=hashes_of(place)) for place in range(num_requests)]


def places(given: list[TraceRequest]) -> list[int]:
    return [int(request.hashes[0, 0]) for request in given if request.hashes is not None]


def begun(directory: Path, num_requests: int, *, resume: bool = False, clock: Clock | None = None) -> ReplayProgress:
    progress = ReplayProgress(
        directory, SETTINGS, num_requests=num_requests, resume=resume, clock=clock or (lambda: 0.0)
    )
    progress.begin(is_cold=not resume)
    return progress


def test_requests_done_in_any_order_are_skipped_and_no_others(tmp_path: Path) -> None:
    progress = begun(tmp_path, 10)
    given = list(progress.remaining(requests(10)))
    for index in (1, 0, 5, 3):
        progress.note(index, hashes_of(index), SERVED)
    progress.end()
    again = begun(tmp_path, 10, resume=True)
    assert (places(given), again.num_skipped) == (list(range(10)), 4)
    assert places(list(again.remaining(requests(10)))) == [2, 4, 6, 7, 8, 9]


def test_indices_of_a_resumed_run_are_those_of_what_it_was_given(tmp_path: Path) -> None:
    progress = begun(tmp_path, 6)
    list(progress.remaining(requests(6)))
    for index in (0, 2):
        progress.note(index, hashes_of(index), SERVED)
    progress.end()
    second = begun(tmp_path, 6, resume=True)
    assert places(list(second.remaining(requests(6)))) == [1, 3, 4, 5]
    for index in (0, 2):  # the requests at 1 and 4
        second.note(index, hashes_of(index), SERVED)
    second.end()
    assert places(list(begun(tmp_path, 6, resume=True).remaining(requests(6)))) == [3, 5]


def test_totals_go_on_and_what_was_not_saved_counts_once(tmp_path: Path) -> None:
    clock = Clock()
    progress = begun(tmp_path, 9, clock=clock)
    list(progress.remaining(requests(9)))
    clock.now = 1.0
    progress.note(0, hashes_of(0), SERVED)  # saved
    progress.note(1, hashes_of(1), SERVED)  # a moment later: not, and then the process is killed
    second = begun(tmp_path, 9, resume=True)
    assert (second.num_skipped, second.before.requests, second.before.blocks) == (1, 1, 4)
    assert places(list(second.remaining(requests(9)))) == list(range(1, 9))
    second.note(0, hashes_of(1), SERVED)
    assert (second.totals.requests, second.totals.hits_by_tier) == (2, {"disk": 4, "host": 2})
    assert second.before.requests == 1, "a copy"


def test_file_is_written_now_and_then_and_removed_when_all_is_done(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / FILE_NAME
    progress = begun(tmp_path, 3, clock=clock)
    list(progress.remaining(requests(3)))
    texts = [file.read_text()]
    for index, now in enumerate((0.01, 0.03, 0.04)):
        clock.now = now
        progress.note(index, hashes_of(index), SERVED)
        texts.append(file.read_text())
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    progress.end()
    assert not list(tmp_path.iterdir())


def test_only_the_first_requests_of_a_run_are_in_its_window(tmp_path: Path) -> None:
    num_requests = WINDOW_REQUESTS + 5
    progress = begun(tmp_path, num_requests)
    list(progress.remaining(requests(num_requests)))
    for index in reversed(range(num_requests)):
        progress.note(index, hashes_of(index), Served(refused="too_large") if index == 2 else SERVED)
    assert (progress.window.requests, progress.totals.requests) == (WINDOW_REQUESTS, num_requests)
    assert progress.window.blocks == 4 * (WINDOW_REQUESTS - 1)
    names = [int(hashes[0, 0]) for hashes in progress.window_hashes()]
    assert names == [0, 1, *range(3, WINDOW_REQUESTS)]


def test_other_settings_are_refused_with_both_named(tmp_path: Path) -> None:
    begun(tmp_path, 3).end()
    other = {**SETTINGS, "tiers": "device 400 blocks"}
    with pytest.raises(ConfigError, match="tiers was device 500 blocks and is device 400 blocks; give what was given"):
        ReplayProgress(tmp_path, other, num_requests=3, resume=True)
    with pytest.raises(ConfigError, match="seed was absent and is 1"):
        ReplayProgress(tmp_path, {**SETTINGS, "seed": "1"}, num_requests=3, resume=True)


def test_an_interrupted_replay_is_not_overwritten_without_being_asked(tmp_path: Path) -> None:
    progress = begun(tmp_path, 3)
    list(progress.remaining(requests(3)))
    progress.note(0, hashes_of(0), SERVED)
    progress.end()
    before = progress.path.read_bytes()
    with pytest.raises(ConfigError, match=r"ended after 1 of 3 requests: give --resume to go on with it, or remove"):
        ReplayProgress(tmp_path, SETTINGS, num_requests=3)
    assert progress.path.read_bytes() == before


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_nothing_to_resume_is_said(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"nothing to resume in .*replay\.progress is absent"):
        ReplayProgress(tmp_path / folder, SETTINGS, num_requests=3, resume=True)


@pytest.mark.parametrize("text", [b"", b"{}", b'{"format": 1, "settings"', b"\0" * 100])
def test_a_damaged_file_is_refused_and_stays(tmp_path: Path, text: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(text)
    with pytest.raises(ConfigError, match=r"is no progress of a replay .*: remove it to begin anew"):
        ReplayProgress(tmp_path, SETTINGS, num_requests=3, resume=True)
    assert (tmp_path / FILE_NAME).read_bytes() == text


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = begun(tmp_path, 3).path
    file.write_bytes(msgspec.json.encode({**msgspec.json.decode(file.read_bytes()), "format": 9}))
    with pytest.raises(ConfigError, match="has format 9, this version reads 1"):
        ReplayProgress(tmp_path, SETTINGS, num_requests=3, resume=True)


def test_warm_start_stands_beside_empty_tiers_and_the_cold_start(tmp_path: Path) -> None:
    """Two requests for the same blocks: from empty tiers the second one alone finds any, in the tier that has room."""
    first = begun(tmp_path, 4)
    list(first.remaining(requests(4)))
    first.note(0, hashes_of(0), Served(blocks=4))
    first.note(1, hashes_of(0), Served(blocks=4, hit_blocks=4, hits_by_tier={"disk": 4}))
    first.end()
    second = begun(tmp_path, 4, resume=True)
    list(second.remaining(requests(4)))
    for index in range(2):
        second.note(index, hashes_of(0), Served(blocks=4, hit_blocks=4, hits_by_tier={"disk": 4}))
    warm = WarmStart.of(second, capacities={"device": 2, "disk": 10}, restored_blocks=9, seconds=0.5)
    assert warm is not None
    assert (warm.rates, warm.empty_rates) == ({"device": 0.0, "disk": 1.0}, {"device": 0.25, "disk": 0.25})
    assert warm.cold_rates == {"device": 0.0, "disk": 0.5}
    assert (warm.skipped_requests, warm.restored_blocks, warm.whole_hit_rate) == (2, 9, 0.75)
    rows = dict(warm.rows())
    assert rows["found in disk, first 2 requests after the start"] == "1.0000"
    assert rows["the same, cold start of the trace"] == "0.5000"
    assert rows["hit rate, runs before included"] == "0.7500"


def test_a_run_that_began_with_nothing_had_no_warm_start(tmp_path: Path) -> None:
    progress = begun(tmp_path, 4)
    list(progress.remaining(requests(4)))
    progress.note(0, hashes_of(0), SERVED)
    assert WarmStart.of(progress, capacities={"device": 9, "disk": 9}, restored_blocks=0, seconds=0.1) is None


@pytest.mark.parametrize("concurrency", [0, 3])
def test_each_request_is_told_of_once_by_its_own_place(backend: Backend, concurrency: int) -> None:
    told: list[tuple[int, int, int]] = []

    def note(index: int, hashes: HashArray, served: Served) -> None:
        told.append((index, int(hashes[0, 0]), served.blocks))

    shape = {"num_layers": 1, "outer_dim": 1, "page_size": 16, "inner_dim": 4, "dtype": "uint8"}
    given = [TraceRequest(hashes=hashes_of(place), session=str(place % 5)) for place in range(40)]
    given[7] = TraceRequest(hashes=hashes_of(7, num_blocks=33))  # too large
    with BlockManager(device_blocks=32, **shape, backend=backend) as manager:
        if concurrency:
            replay_concurrently(manager, given, concurrency=concurrency, on_served=note)
        else:
            replay(manager, given, on_served=note)
    assert sorted(told) == [(place, place, 0 if place == 7 else 4) for place in range(40)]


def test_totals_of_nothing_have_rates() -> None:
    assert Totals().rates(["device"]) == {"device": 0.0}
